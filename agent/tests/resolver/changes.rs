//! Names that are told to have changed: they are asked for anew, and what was known of them is given only where no
//! registrar answers.

use muster_agent::resolver::HeldService;

use super::{
    forwarding::{ask, first_address},
    *,
};

const NAME: &str = "my-cs.shop.svc.net.example.";

/// What a registrar answers to A.
#[derive(Clone, Copy)]
struct Script {
    code: ResponseCode,
    /// Last octet of the address.
    last: u8,
    ttl: u32,
    /// Whether answers are held back, though they be made.
    held_back: bool,
}

/// A registrar that answers as it is told.
struct Scripted(watch::Receiver<Script>);

impl Handler for Scripted {
    fn handle(&self, query: &[u8], _: &Source, out: &mut Vec<u8>) -> Handling {
        let Parsed::Request(request) = parse(query) else { panic!("not a query") };
        let Script { code, last, ttl, .. } = *self.0.borrow();
        let mut response = request.response(code);
        if code == ResponseCode::NoError {
            let name = request.question.name.clone();
            response.answers.push(Record::from_rdata(name, ttl, RData::A(A([100, 64, 0, last].into()))));
        }
        response.encode(1200, out).unwrap();
        let (mut script, out) = (self.0.clone(), std::mem::take(out));
        Handling::Later(Box::pin(async move {
            let _ = script.wait_for(|script| !script.held_back).await;
            (Outcome::Silence, out)
        }))
    }
}

/// A host and its registrar.
struct Net {
    host: Arc<Host>,
    registrar: Running,
    script: watch::Sender<Script>,
}

impl Net {
    async fn new(ttl: u32) -> Self {
        let authority = Authority::new();
        let script =
            watch::Sender::new(Script { code: ResponseCode::NoError, last: 1, ttl, held_back: false });
        let registrar = registrar_with(&authority, Scripted(script.subscribe()));
        let host = Arc::new(host(&authority.credentials(DEVICE), &[registrar.address.to_string()], &[]));
        host.ready().await;
        Self { host, registrar, script }
    }

    /// Code and last octet of the address in the answer.
    async fn ask(&self) -> (ResponseCode, Option<u8>) {
        let response = ask(&self.host, NAME).await;
        let last = first_address(&response).map(|address| match address {
            IpAddr::V4(address) => address.octets()[3],
            IpAddr::V6(_) => panic!("{address} is no answer to A"),
        });
        (response.metadata.response_code, last)
    }

    fn change(&self, change: impl FnOnce(&mut Script)) {
        self.script.send_modify(change);
        self.host.resolver.invalidate_service(&service());
    }
}

fn service() -> HeldService {
    HeldService { namespace: "shop".into(), name: "my-cs".into() }
}

const fn at(last: u8) -> (ResponseCode, Option<u8>) {
    (ResponseCode::NoError, Some(last))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_changes_is_answered_for_anew() {
    let net = Net::new(60).await;
    let resolver = &net.host.resolver;
    let changes = resolver.held_changes();
    assert_eq!(net.ask().await, at(1));
    assert_eq!(resolver.held_services(), [service()]);
    assert!(changes.has_changed().unwrap());
    net.script.send_modify(|script| script.last = 2);
    assert_eq!(net.ask().await, at(1));
    resolver.invalidate_service(&HeldService { name: "other".into(), ..service() });
    assert_eq!(net.ask().await, at(1));
    resolver.invalidate_service(&service());
    assert_eq!(resolver.held_services(), [service()]);
    assert_eq!(net.ask().await, at(2));
    // As fresh as any.
    let asked = net.registrar.queries();
    assert_eq!(net.ask().await, at(2));
    assert_eq!(net.registrar.queries(), asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_changed_is_given_where_no_registrar_answers() {
    let net = Net::new(60).await;
    assert_eq!(net.ask().await, at(1));
    net.change(|script| script.last = 2);
    let Net { host, registrar, .. } = net;
    registrar.stop().await;
    for _ in 0..3 {
        let response = ask(&host, NAME).await;
        assert_eq!(first_address(&response), Some([100, 64, 0, 1].into()));
        assert_eq!(response.answers[0].ttl, 30, "as stale");
    }
    let answer = host.resolver.resolve(NAME).await.unwrap();
    assert!(answer.stale && answer.ttl.is_zero());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_deleted_does_not_come_back_without_a_registrar() {
    let net = Net::new(60).await;
    assert_eq!(net.ask().await, at(1));
    // It does not even say for how long.
    net.change(|script| script.code = ResponseCode::NXDomain);
    assert_eq!(net.ask().await, (ResponseCode::NXDomain, None));
    let Net { host, registrar, .. } = net;
    registrar.stop().await;
    assert_eq!(ask(&host, NAME).await.metadata.response_code, ResponseCode::ServFail);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_was_under_way_during_a_change_is_kept_for_need_alone() {
    let net = Net::new(60).await;
    net.script.send_modify(|script| script.held_back = true);
    let host = Arc::clone(&net.host);
    let asking = tokio::spawn(async move { first_address(&ask(&host, NAME).await) });
    while net.registrar.queries() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    net.change(|script| script.held_back = false);
    assert_eq!(asking.await.unwrap(), Some([100, 64, 0, 1].into()));
    // Not while the registrar is there,
    net.script.send_modify(|script| script.code = ResponseCode::ServFail);
    let asked = net.registrar.queries();
    // but where it cannot tell,
    assert_eq!(net.ask().await, at(1));
    assert!(net.registrar.queries() > asked);
    // or is away.
    let Net { host, registrar, .. } = net;
    registrar.stop().await;
    assert_eq!(first_address(&ask(&host, NAME).await), Some([100, 64, 0, 1].into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_from_before_a_change_is_not_remembered() {
    let net = Net::new(60).await;
    net.script.send_modify(|script| (script.held_back, script.code) = (true, ResponseCode::ServFail));
    let host = Arc::clone(&net.host);
    let asking = tokio::spawn(async move { ask(&host, NAME).await.metadata.response_code });
    while net.registrar.queries() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    net.change(|script| (script.held_back, script.code) = (false, ResponseCode::NoError));
    assert_eq!(asking.await.unwrap(), ResponseCode::ServFail);
    assert_eq!(net.ask().await, at(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registrar_that_cannot_tell_takes_no_known_name_away() {
    use ResponseCode as Code;
    for code in [Code::ServFail, Code::Refused, Code::NotImp, Code::FormErr, Code::NotAuth] {
        for (ttl, changed) in [(0, false), (60, true)] {
            let net = Net::new(ttl).await;
            assert_eq!(net.ask().await, at(1));
            net.script.send_modify(|script| script.code = code);
            if changed {
                net.host.resolver.invalidate_service(&service());
            }
            let asked = net.registrar.queries();
            assert_eq!(net.ask().await, at(1), "{code}, changed: {changed}");
            assert!(net.registrar.queries() > asked);
            // Others hear what it said, from memory for a while.
            let of_another = || async { ask(&net.host, "another.net.example.").await.metadata.response_code };
            assert_eq!(of_another().await, code);
            let asked = net.registrar.queries();
            assert_eq!((of_another().await, net.registrar.queries()), (code, asked));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_known_is_given_where_there_is_no_room_for_another_question() {
    let net = Net::new(60).await;
    assert_eq!(net.ask().await, at(1));
    net.change(|script| script.held_back = true);
    let host = &net.host;
    let ask = |n: usize| {
        let host = Arc::clone(host);
        tokio::spawn(async move { host.resolver.resolve(&format!("n{n}")).await })
    };
    let asking: Vec<_> = (0..600).map(ask).collect();
    for n in 600.. {
        // What there was still room for does not end.
        let asked = tokio::time::timeout(Duration::from_millis(10), ask(n)).await;
        if let Ok(asked) = asked {
            let error = asked.unwrap().unwrap_err().to_string();
            assert!(error.contains("are waiting for an answer already"), "{error}");
            break;
        }
    }
    assert_eq!(net.ask().await, at(1));
    net.script.send_modify(|script| script.held_back = false);
    for asked in asking {
        let _ = asked.await.unwrap();
    }
}
