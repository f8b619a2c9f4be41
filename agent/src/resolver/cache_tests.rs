//! The cache on its own, with time under the test's control: freshness, staleness, bounds, snapshots; and against
//! a plain model over any sequence of steps.

use std::collections::HashMap;

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{
        RData, Record, RecordType,
        rdata::{A, SOA, TXT},
    },
};
use muster_common::time::Timestamp;
use muster_dns::message::{Parsed, Request, Transport, parse};
use proptest::prelude::*;

use super::{super::snapshot, *};

fn at(seconds: u64) -> Instant {
    Instant::from_boot(Duration::from_secs(1000 + seconds))
}

fn clock(seconds: u64) -> Timestamp {
    Timestamp::from_epoch(Duration::from_secs(1_790_000_000 + seconds))
}

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

fn request(text: &str, record_type: RecordType, payload: Option<u16>) -> Request {
    let mut message = Message::new(77, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name(text), record_type));
    message.edns = payload.map(|size| {
        let mut edns = Edns::new();
        edns.set_max_payload(size);
        edns
    });
    match parse(&message.to_vec().unwrap()) {
        Parsed::Request(request) => request,
        other => panic!("{other:?}"),
    }
}

fn key(text: &str) -> Key {
    Key::of(&request(text, RecordType::A, None))
}

fn response(text: &str) -> Message {
    let mut message = Message::response(1, OpCode::Query);
    message.add_query(Query::query(name(text), RecordType::A));
    message
}

fn positive(text: &str, ttl: u32) -> Message {
    let mut message = response(text);
    message.add_answer(Record::from_rdata(name(text), ttl, RData::A(A([100, 64, 0, 1].into()))));
    let private = name(text).prepend_label("private").unwrap();
    message.add_additional(Record::from_rdata(private, ttl + 5, RData::A(A([192, 168, 0, 1].into()))));
    message
}

fn negative(text: &str, code: ResponseCode, ttl: u32, minimum: u32) -> Message {
    let mut message = response(text);
    message.metadata.response_code = code;
    let soa = SOA::new(name("ns.dns.net.example."), name("hostmaster.net.example."), 1, 2, 3, 4, minimum);
    message.add_authority(Record::from_rdata(name("net.example."), ttl, RData::SOA(soa)));
    message
}

fn stored(message: Message) -> Arc<Stored> {
    Arc::new(Stored::new(message, u32::MAX).unwrap())
}

fn cache() -> Cache {
    Cache::new(CacheLimits::default())
}

fn age(cache: &mut Cache, text: &str, seconds: u64) -> Option<Age> {
    cache.lookup(&key(text), at(seconds)).map(|hit| hit.age)
}

#[test]
fn answers_hold_as_long_as_they_say_then_turn_stale_then_go() {
    let limits = CacheLimits { network_stale: Duration::from_secs(100), ..CacheLimits::default() };
    let mut cache = Cache::new(limits);
    cache.insert(key("web.net.example."), stored(positive("web.net.example.", 10)), Origin::Network, at(0));
    assert_eq!(age(&mut cache, "web.net.example.", 0), Some(Age::Fresh(0)));
    assert_eq!(age(&mut cache, "WEB.net.example.", 9), Some(Age::Fresh(9)));
    assert_eq!(age(&mut cache, "web.net.example.", 10), Some(Age::Stale));
    assert_eq!(age(&mut cache, "web.net.example.", 109), Some(Age::Stale));
    assert_eq!(age(&mut cache, "web.net.example.", 110), None);
    assert_eq!((cache.len(), cache.octets()), (0, 0));
    // Time to live 0: of no use but as a last resort.
    cache.insert(key("web.net.example."), stored(positive("web.net.example.", 0)), Origin::Network, at(0));
    assert_eq!(age(&mut cache, "web.net.example.", 0), Some(Age::Stale));
}

#[test]
fn negative_answers_hold_by_their_soa_and_for_their_own_name_and_type_only() {
    let mut cache = cache();
    for (ttl, minimum) in [(7, 30), (30, 7)] {
        let message = negative("no.net.example.", ResponseCode::NXDomain, ttl, minimum);
        cache.insert(key("no.net.example."), stored(message), Origin::Network, at(0));
        assert_eq!(age(&mut cache, "no.net.example.", 6), Some(Age::Fresh(6)));
        assert_eq!(age(&mut cache, "no.net.example.", 7), Some(Age::Stale));
    }
    assert_eq!(age(&mut cache, "below.no.net.example.", 1), None);
    let text = Key::of(&request("no.net.example.", RecordType::TXT, None));
    assert!(cache.lookup(&text, at(1)).is_none());
    // Without an SOA nothing is kept, and failures are not either.
    for code in [ResponseCode::NXDomain, ResponseCode::NoError, ResponseCode::ServFail, ResponseCode::Refused]
    {
        let mut message = response("x.net.example.");
        message.metadata.response_code = code;
        cache.insert(key("x.net.example."), stored(message), Origin::Network, at(0));
        assert_eq!(age(&mut cache, "x.net.example.", 0), None);
    }
}

#[test]
fn long_times_to_live_are_cut() {
    let limits = CacheLimits {
        positive_ttl: Duration::from_secs(60),
        negative_ttl: Duration::from_secs(20),
        ..CacheLimits::default()
    };
    let mut cache = Cache::new(limits);
    let message = Stored::new(positive("a.example.", 9999), cache.ttl_max()).unwrap();
    assert_eq!(message.ttl, Some(60));
    cache.insert(key("a.example."), message.into(), Origin::Upstream, at(0));
    assert_eq!(age(&mut cache, "a.example.", 60), Some(Age::Stale));
    let message = negative("b.example.", ResponseCode::NXDomain, 9999, 9999);
    cache.insert(key("b.example."), stored(message), Origin::Upstream, at(0));
    assert_eq!(age(&mut cache, "b.example.", 20), Some(Age::Stale));
    // And short ones are drawn out, if that is configured.
    let mut cache = Cache::new(CacheLimits { least_ttl: Duration::from_secs(5), ..CacheLimits::default() });
    cache.insert(key("a.example."), stored(positive("a.example.", 1)), Origin::Upstream, at(0));
    assert_eq!(age(&mut cache, "a.example.", 4), Some(Age::Fresh(4)));
    assert_eq!(age(&mut cache, "a.example.", 5), Some(Age::Stale));
}

#[test]
fn servers_are_asked_again_in_good_time_and_not_too_often() {
    let mut cache = cache();
    let web = key("web.net.example.");
    cache.insert(web.clone(), stored(positive("web.net.example.", 100)), Origin::Network, at(0));
    let refresh = |cache: &mut Cache, seconds| cache.lookup(&web, at(seconds)).unwrap().refresh;
    // Not of use so far; then of use, but not yet about to expire.
    assert!(!refresh(&mut cache, 95));
    assert!(refresh(&mut cache, 95));
    assert!(!refresh(&mut cache, 95));
    assert!(refresh(&mut cache, 96));
    assert!(refresh(&mut cache, 101));
    cache.failed(&web, at(101));
    assert!(!refresh(&mut cache, 105));
    assert!(refresh(&mut cache, 106));
}

fn change(cache: &mut Cache, text: &str) {
    cache.outdate_with_reverse(&wire_name(&name(text)));
}

/// A cache with `web.net.example.`, which has changed.
fn changed() -> Cache {
    let mut cache = cache();
    cache.insert(key("web.net.example."), stored(positive("web.net.example.", 10)), Origin::Network, at(0));
    change(&mut cache, "web.net.example.");
    cache
}

#[test]
fn a_name_changes_with_all_below_and_the_reverse_names_of_its_addresses() {
    let mut cache = cache();
    let names = [
        "web.net.example.",
        "private.web.net.example.",
        "1.0.64.100.in-addr.arpa.",
        "webs.net.example.",
        "db.net.example.",
        "2.0.64.100.in-addr.arpa.",
    ];
    for text in names {
        cache.insert(key(text), stored(positive(text, 10)), Origin::Network, at(0));
    }
    cache.keep_failure(key("x.web.net.example."), stored(failure()), Origin::Network, at(0));
    let (octets, entries) = (cache.octets(), cache.len());
    change(&mut cache, "web.net.example.");
    let ages = names.map(|text| age(&mut cache, text, 0).unwrap());
    let (outdated, fresh) = (Age::Outdated, Age::Fresh(0));
    assert_eq!(ages, [outdated, outdated, outdated, fresh, fresh, fresh]);
    assert_eq!((cache.octets(), cache.len()), (octets, entries), "all of them still take their place");
    assert_eq!(age(&mut cache, "x.web.net.example.", 0), None, "failures are no answers");
    // Longer than it holds, and no longer than anything else.
    assert_eq!(age(&mut cache, "web.net.example.", 11), Some(outdated));
    assert_eq!(age(&mut cache, "web.net.example.", 31 * 86_400), None);
}

#[test]
fn servers_are_asked_at_once_for_what_has_changed_and_then_once_a_second() {
    let mut cache = cache();
    let web = key("web.net.example.");
    let refresh = |cache: &mut Cache, seconds| cache.lookup(&web, at(seconds)).unwrap().refresh;
    cache.insert(web.clone(), stored(positive("web.net.example.", 10)), Origin::Network, at(0));
    cache.failed(&web, at(9));
    assert!(!refresh(&mut cache, 10));
    change(&mut cache, "web.net.example.");
    assert!(refresh(&mut cache, 10));
    cache.failed(&web, at(10));
    assert!(!refresh(&mut cache, 10));
    assert!(refresh(&mut cache, 11));
}

#[test]
fn whatever_the_servers_answer_takes_the_place_of_what_has_changed() {
    let web = key("web.net.example.");
    let there = positive("web.net.example.", 10);
    let gone = negative("web.net.example.", ResponseCode::NXDomain, 10, 10);
    for message in [there.clone(), gone] {
        let mut cache = changed();
        cache.insert(web.clone(), stored(message.clone()), Origin::Network, at(1));
        let hit = cache.lookup(&web, at(1)).unwrap();
        assert_eq!((hit.age, hit.stored), (Age::Fresh(0), stored(message)));
        assert_eq!(cache.len(), 1);
    }
    // Even what cannot be kept.
    for code in [ResponseCode::NXDomain, ResponseCode::NoError] {
        let mut cache = changed();
        let mut message = response("web.net.example.");
        message.metadata.response_code = code;
        cache.insert(web.clone(), stored(message), Origin::Network, at(1));
        assert_eq!((age(&mut cache, "web.net.example.", 1), cache.octets()), (None, 0));
    }
    // But not what is no answer.
    let mut cache = changed();
    cache.insert(web.clone(), stored(failure()), Origin::Network, at(1));
    cache.keep_failure(web, stored(failure()), Origin::Network, at(1));
    assert_eq!(age(&mut cache, "web.net.example.", 1), Some(Age::Outdated));
}

/// That a server cannot tell.
fn failure() -> Message {
    let mut message = response("web.net.example.");
    message.metadata.response_code = ResponseCode::Refused;
    message
}

#[test]
fn an_answer_from_before_a_change_is_better_than_an_older_one_or_none() {
    let web = key("web.net.example.");
    let late = stored(positive("web.net.example.", 20));
    let ttl = |cache: &mut Cache| {
        let hit = cache.lookup(&key("web.net.example."), at(2)).unwrap();
        (hit.stored.ttl, hit.age, hit.refresh)
    };
    for mut cache in [cache(), changed()] {
        cache.insert_outdated(web.clone(), Arc::clone(&late), Origin::Network, at(2));
        assert_eq!(ttl(&mut cache), (Some(20), Age::Outdated, true));
    }
    // One from after it is better still.
    let mut cache = changed();
    cache.insert(web.clone(), stored(positive("web.net.example.", 10)), Origin::Network, at(1));
    cache.insert_outdated(web.clone(), late, Origin::Network, at(2));
    assert_eq!(ttl(&mut cache), (Some(10), Age::Fresh(1), false));
    // And nothing is better than what says nothing.
    let mut cache = changed();
    cache.insert_outdated(web, stored(response("web.net.example.")), Origin::Network, at(2));
    assert_eq!(ttl(&mut cache), (Some(10), Age::Outdated, true));
}

#[test]
fn what_has_changed_is_held_as_before() {
    let mut cache = Cache::new(CacheLimits::default()).holding(&"net.example".parse().unwrap());
    let text = "my-cs.shop.svc.net.example.";
    cache.insert(key(text), stored(positive(text, 10)), Origin::Network, at(0));
    let (services, changes) = (cache.held().services(), cache.held().changes());
    change(&mut cache, text);
    assert_eq!((services.len(), cache.held().services()), (1, services));
    assert!(!changes.has_changed().unwrap());
    // It counts once: what disproves it is the end of it.
    cache.insert(key(text), stored(response(text)), Origin::Network, at(1));
    assert!(cache.held().services().is_empty() && changes.has_changed().unwrap());
}

#[test]
fn what_takes_the_place_of_what_has_changed_is_new() {
    let web = key("web.net.example.");
    let gone = || stored(negative("web.net.example.", ResponseCode::NXDomain, 10, 10));
    let mut cache = changed();
    let mut insert = |stored, change_first| {
        if change_first {
            change(&mut cache, "web.net.example.");
        }
        cache.saved();
        cache.insert(web.clone(), stored, Origin::Network, at(1));
        cache.unsaved()
    };
    let there = || stored(positive("web.net.example.", 10));
    assert_eq!(insert(there(), true), Unsaved::New);
    assert_eq!(insert(there(), false), Unsaved::Refreshed);
    assert_eq!(insert(gone(), true), Unsaved::New);
    assert_eq!(insert(gone(), true), Unsaved::Refreshed);
}

#[test]
fn a_hundred_thousand_answers_fit_into_what_the_documentation_says() {
    let mut cache = Cache::new(CacheLimits { octets: 40 << 20, ..CacheLimits::default() });
    for i in 0..100_000 {
        let text = format!("host-{i}.net.example.");
        let mut message = response(&text);
        message.add_answer(Record::from_rdata(name(&text), 60, RData::A(A([100, 64, 0, 1].into()))));
        cache.insert(key(&text), stored(message), Origin::Upstream, at(0));
    }
    assert_eq!((cache.len(), cache.evictions()), (100_000, 0));
    assert!((200..400).contains(&(cache.octets() / cache.len())), "{}", cache.octets() / cache.len());
}

fn written(stored: &Stored, request: &Request, transport: Transport, age: Age) -> (Message, usize) {
    let mut out = vec![9; 3];
    stored.write(request, transport, age, &mut out);
    (Message::from_vec(&out).unwrap(), out.len())
}

#[test]
fn what_is_written_is_the_response_counted_down_and_spelled_as_asked() {
    let stored = stored(positive("web.net.example.", 10));
    let asked = request("wEb.Net.example.", RecordType::A, None);
    let (message, _) = written(&stored, &asked, Transport::Udp, Age::Fresh(3));
    assert_eq!(message.metadata.id, 77);
    assert!(message.metadata.recursion_available && message.metadata.recursion_desired);
    assert!(!message.metadata.authoritative);
    assert_eq!(message.edns, None);
    let spelled = |record: &Record, expected: &str| record.name.eq_case(&name(expected));
    assert!(spelled(&message.answers[0], "wEb.Net.example."));
    assert!(spelled(&message.additionals[0], "private.wEb.Net.example."));
    assert_eq!((message.answers[0].ttl, message.additionals[0].ttl), (7, 12));

    let with_edns = request("web.net.example.", RecordType::A, Some(1232));
    let (message, _) = written(&stored, &with_edns, Transport::Udp, Age::Stale);
    assert_eq!((message.answers[0].ttl, message.additionals[0].ttl), (30, 30));
    let edns = message.edns.unwrap();
    assert_eq!((edns.max_payload(), edns.options().as_ref().len()), (1232, 1));
}

#[test]
fn what_is_too_large_for_udp_is_truncated() {
    let mut large = response("big.example.");
    for i in 0..30_u8 {
        let text = TXT::new(vec![format!("{i}").repeat(20)]);
        large.add_answer(Record::from_rdata(name("big.example."), 10, RData::TXT(text)));
    }
    large.queries[0].set_query_type(RecordType::TXT);
    let stored = stored(large);
    for (payload, limit) in [(None, 512), (Some(800), 800)] {
        let asked = request("big.example.", RecordType::TXT, payload);
        let (message, octets) = written(&stored, &asked, Transport::Udp, Age::Fresh(4));
        assert!(octets <= limit && message.metadata.truncation && message.answers.len() < 30);
        assert!(message.metadata.recursion_available && message.answers.iter().all(|r| r.ttl == 6));
        let (message, _) = written(&stored, &asked, Transport::Tcp, Age::Fresh(4));
        assert!(!message.metadata.truncation && message.answers.len() == 30);
    }
}

#[test]
fn a_snapshot_comes_back_as_stale_answers() {
    let domain: muster_common::name::Domain = "net.example".parse().unwrap();
    let mut before = cache();
    before.insert(key("web.net.example."), stored(positive("web.net.example.", 10)), Origin::Network, at(0));
    before.insert(key("db.net.example."), stored(positive("db.net.example.", 10)), Origin::Network, at(0));
    before.insert(key("example.org."), stored(positive("example.org.", 10)), Origin::Upstream, at(0));
    let octets = snapshot::save(&before, &domain, at(5), clock(5));

    change(&mut before, "db.net.example.");
    let octets_changed = snapshot::save(&before, &domain, at(5), clock(5));
    let mut after = cache();
    // The host has been started anew: its boot clock is back at the start.
    let boot = Instant::from_boot(Duration::from_secs(3));
    let restored = snapshot::restore(&octets, &mut after, &domain, boot, clock(600));
    assert_eq!(restored, Ok(2));
    let hit = after.lookup(&key("web.net.example."), boot).unwrap();
    assert_eq!((hit.age, hit.refresh, hit.origin), (Age::Stale, true, Origin::Network));
    assert_eq!(*hit.stored, *stored(positive("web.net.example.", 10)));
    assert!(after.lookup(&key("example.org."), boot).is_none());
    // What had changed by then is still known to have.
    let mut changed = cache();
    assert_eq!(snapshot::restore(&octets_changed, &mut changed, &domain, boot, clock(600)), Ok(2));
    let ages =
        ["db.net.example.", "web.net.example."].map(|text| changed.lookup(&key(text), boot).unwrap().age);
    assert_eq!(ages, [Age::Outdated, Age::Stale]);
    // Long after, it is of no use any more.
    let restored = snapshot::restore(&octets, &mut after, &domain, boot, clock(40 * 86_400));
    assert_eq!(restored, Ok(0));
    let other = "other.example".parse().unwrap();
    assert!(snapshot::restore(&octets, &mut cache(), &other, boot, clock(0)).is_err());
}

proptest! {
    #[test]
    fn a_damaged_snapshot_is_refused_whole(
        place in any::<prop::sample::Index>(), flip in 1_u8.., cut in any::<prop::sample::Index>(),
        noise in proptest::collection::vec(any::<u8>(), 0..100),
    ) {
        let domain = "net.example".parse().unwrap();
        let mut before = cache();
        before.insert(key("web.net.example."), stored(positive("web.net.example.", 10)), Origin::Network, at(0));
        let good = snapshot::save(&before, &domain, at(0), clock(0));
        let mut flipped = good.clone();
        flipped[place.index(good.len())] ^= flip;
        for bad in [&flipped[..], &good[..cut.index(good.len())], &noise[..]] {
            let mut after = cache();
            prop_assert!(snapshot::restore(bad, &mut after, &domain, at(0), clock(0)).is_err());
            prop_assert_eq!(after.len(), 0);
        }
    }

    /// Over any sequence of steps: within its bound, exact in its count, and right about what it holds.
    #[test]
    fn the_cache_agrees_with_a_model(
        steps in proptest::collection::vec((0_u8..5, 0_u8..12, 0_u32..40, 0_u64..15), 1..200),
        octets in 1000_usize..4000,
    ) {
        let limits = CacheLimits { octets, network_stale: Duration::from_secs(50), ..CacheLimits::default() };
        let mut cache = Cache::new(limits);
        let mut model: HashMap<u8, (u64, u32, bool)> = HashMap::new();
        let mut now = 0;
        for (step, which, ttl, wait) in steps {
            now += wait;
            let text = format!("d{which}.net.example.");
            match step {
                0 | 1 => {
                    cache.insert(key(&text), stored(positive(&text, ttl)), Origin::Network, at(now));
                    model.insert(which, (now, ttl, false));
                }
                2 => {
                    change(&mut cache, &text);
                    model.entry(which).and_modify(|(.., outdated)| *outdated = true);
                }
                3 => {
                    if !cache.entries.contains_key(&*key(&text)) {
                        model.remove(&which);
                    }
                    cache.insert_outdated(key(&text), stored(positive(&text, ttl)), Origin::Network, at(now));
                    if model.get(&which).is_none_or(|(.., outdated)| *outdated) {
                        model.insert(which, (now, ttl, true));
                    }
                }
                _ => {}
            }
            prop_assert!(cache.octets() <= octets);
            let exact: usize =
                cache.entries.iter().map(|(k, e)| size(k, e)).sum();
            prop_assert_eq!(cache.octets(), exact);
            let age = age(&mut cache, &text, now);
            let expected = model.get(&which).and_then(|(since, ttl, outdated)| {
                let ttl = u64::from(*ttl);
                match now - since {
                    past if past < ttl + 50 && *outdated => Some(Age::Outdated),
                    past if past < ttl => Some(Age::Fresh(u32::try_from(past).unwrap())),
                    past if past < ttl + 50 => Some(Age::Stale),
                    _ => None,
                }
            });
            // What had to give way for others is forgotten; nothing else ever differs.
            prop_assert!(age.is_none() || age == expected, "{age:?} {expected:?}");
            if age.is_none() {
                model.remove(&which);
            }
            if matches!(step, 0 | 1) {
                prop_assert_eq!(age, expected);
            }
        }
    }

    /// Whatever a server sends, keeping and writing it does not panic and stays within the client's limit.
    #[test]
    fn any_response_is_survived(octets in proptest::collection::vec(any::<u8>(), 0..300), udp in any::<bool>()) {
        let mut octets = octets;
        if octets.len() > 12 {
            octets[4..12].copy_from_slice(&[0, 1, 0, 1, 0, 0, 0, 0]);
        }
        let Ok(message) = Message::from_vec(&octets) else { return Ok(()) };
        let Ok(stored) = Stored::new(message, 60) else { return Ok(()) };
        let transport = if udp { Transport::Udp } else { Transport::Tcp };
        let mut out = Vec::new();
        stored.write(&request("a.example.", RecordType::A, Some(600)), transport, Age::Stale, &mut out);
        prop_assert!(!udp || out.len() <= 600);
    }
}
