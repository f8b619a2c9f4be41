//! Any query in any mode: no panic, within the limits, and readable.

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::RecordType,
};
use muster_dns::{
    directory::Viewer,
    engine::{Engine, QueryContext, Step},
    message::Transport,
    options::{Fallthrough, Options, PodMode},
};
use proptest::prelude::*;

use crate::{
    network::{directory, reply},
    support::{label, member, query},
};

fn options() -> impl Strategy<Value = Options> {
    let pods = prop_oneof![Just(PodMode::Disabled), Just(PodMode::Insecure), Just(PodMode::Verified)];
    (pods, any::<[bool; 7]>()).prop_map(
        |(pods, [names, ignore, endpoints, exposed, through, complete, headless])| Options {
            pods,
            endpoint_device_names: names,
            ignore_empty_services: ignore,
            endpoints,
            namespaces: exposed.then(|| [label("default")].into()),
            transfer_to: vec!["100.64.1.0/24".parse().unwrap()],
            fallthrough: if through { Fallthrough::Always } else { Fallthrough::Never },
            complete,
            host_search: vec!["corp.example".to_owned(), "not a name..".to_owned()],
            external_headless: headless,
            reverse_zones: vec!["10.9.0.0/16".parse().unwrap()],
        },
    )
}

fn name() -> impl Strategy<Value = String> {
    let label = "web|db|db-0|prod|default|svc|pod|dns|ns|ns1|_http|_tcp|_|_pg|100-64-1-7|hop11|round|out|lb|lbhost\
                 |e|crew|[0-9]{1,3}|[a-zA-Z0-9_-]{1,63}";
    let tails =
        ["net.example.", "default.svc.net.example.", "ext.example.", "64.100.in-addr.arpa.", "org.", "."];
    (proptest::collection::vec(label, 0..6), prop::sample::select(tails.to_vec())).prop_filter_map(
        "too long",
        |(labels, tail)| {
            let left: String = labels.iter().map(|l| format!("{l}.")).collect();
            let name = if tail == "." && !left.is_empty() { left } else { left + tail };
            (name.len() < 250).then_some(name)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn every_query_is_answered_within_its_limits(
        options in options(), name in name(), other in any::<u16>(), id in any::<u16>(),
        common in prop::option::of(prop::sample::select(vec![
            RecordType::A, RecordType::AAAA, RecordType::SRV, RecordType::CNAME, RecordType::PTR,
            RecordType::AXFR, RecordType::IXFR, RecordType::NS, RecordType::ANY,
        ])),
        who in 0..4, udp in any::<bool>(), failing in any::<bool>(),
    ) {
        let kind = common.unwrap_or(RecordType::from(other));
        let mut message = query(&name, kind);
        message.metadata.id = id;
        let octets = message.to_vec().unwrap();
        let viewer = match who {
            0 => Viewer::Stranger,
            1 => Viewer::Open,
            2 => member("other", "d1"),
            _ => member("net", "d1"),
        };
        let stranger = viewer == Viewer::Stranger;
        let transport = if udp { Transport::Udp } else { Transport::Tcp };
        let context = QueryContext { viewer, transport, source: Some("100.64.1.7".parse().unwrap()) };
        let engine = Engine::with_options(directory(), options);
        let _ = engine.metadata(&octets, &context);
        let (mut out, mut alone) = (Vec::new(), Vec::new());
        engine.answer(&octets, &context, &mut alone);
        let absent = reply(ResponseCode::NXDomain, Vec::new());
        let mut step = engine.begin(&octets, &context, &mut out);
        let mut asked = 0;
        while let Step::Ask(upstream) = step {
            prop_assert!(!stranger);
            asked += 1;
            prop_assert!(asked < 10);
            step = engine.resume(upstream, (!failing).then_some(&absent), &mut out);
        }
        for out in [&out, &alone] {
            let response = Message::from_vec(out).unwrap();
            prop_assert_eq!(response.metadata.id, id);
            prop_assert!(response.queries[0].name.eq_case(&message.queries[0].name));
            prop_assert_eq!(response.queries[0].query_type, kind);
            let limit = if udp { 1232 } else { 65_535 };
            prop_assert!(out.len() <= limit);
            if stranger && udp {
                prop_assert!(out.len() + 28 <= 3 * (octets.len() + 28));
            }
            // Answers begin with the asked name; each CNAME leads to what follows.
            if let Some(first) = response.answers.first() {
                prop_assert!(first.name.eq_case(&message.queries[0].name));
            }
        }
        if let Some(mut transfer) = engine.transfer(&octets, &context) {
            while transfer.next_message(&mut out).is_some() {
                Message::from_vec(&out).unwrap();
            }
        }
    }
}
