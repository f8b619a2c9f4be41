//! Questions under way to the servers: each is asked once at a time, however many ask it. When a name changes, whoever
//! asks from then on waits for an answer from after the change.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use tokio::runtime::Handle;

use super::{
    key::{Key, is_below},
    service::QueryError,
    stored::Stored,
};

/// Questions that servers are asked at a time.
pub(super) const FLIGHTS_MAX: usize = 1024;
/// Where the reverse names are, on the wire.
const REVERSE: &[u8] = b"\x04arpa\0";

/// What the servers say in the end.
pub(super) type Landed = Result<Arc<Stored>, QueryError>;
/// A question under way, shared by all who ask it.
pub(super) type Flight = Shared<BoxFuture<'static, Landed>>;

/// All questions under way.
#[derive(Default)]
pub(super) struct Flights(Mutex<UnderWay>);

#[derive(Default)]
struct UnderWay {
    /// By question, each with its number.
    flights: HashMap<Key, (u64, Flight)>,
    started: u64,
}

/// One of them, as whoever fetches the answer has it. Ends when this is dropped.
pub(super) struct Landing {
    flights: Arc<Flights>,
    pub(super) key: Key,
    number: u64,
}

impl Flights {
    fn under_way(&self) -> MutexGuard<'_, UnderWay> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Joins those who wait for an answer to `key`, or is the first of them, and has `fetch` done on `runtime`.
    pub(super) fn join<F>(
        self: &Arc<Self>,
        key: &Key,
        runtime: &Handle,
        fetch: impl FnOnce(Landing) -> F + Send + 'static,
    ) -> Result<Flight, QueryError>
    where
        F: Future<Output = Landed> + Send,
    {
        let mut under_way = self.under_way();
        if let Some((_, flight)) = under_way.flights.get(key) {
            return Ok(flight.clone());
        }
        if under_way.flights.len() >= FLIGHTS_MAX {
            return Err(QueryError::Busy);
        }
        under_way.started += 1;
        let number = under_way.started;
        let (flights, own_key) = (Arc::clone(self), key.clone());
        // A task of its own: the answer is of use also when nobody waits for it any more. The landing is made in there,
        // since a runtime that is shutting down drops the task at once, while we hold the lock.
        let task = runtime.spawn(async move { fetch(Landing { flights, key: own_key, number }).await });
        let flight = task
            .map(|joined| joined.unwrap_or_else(|e| Err(QueryError::Unreadable(e.to_string()))))
            .boxed()
            .shared();
        under_way.flights.insert(key.clone(), (number, flight.clone()));
        Ok(flight)
    }

    /// Everything at and below `zone` has changed: what is under way may be older. So may reverse names, of which it
    /// is not known yet whose they are.
    pub(super) fn outdate(&self, zone: &[u8]) {
        let changed = |name: &[u8]| is_below(name, zone) || is_below(name, REVERSE);
        self.under_way().flights.retain(|key, _| !changed(key.wire_name()));
    }
}

impl Landing {
    /// Whether nothing has changed since the question was asked.
    pub(super) fn is_current(&self) -> bool {
        self.flights.under_way().flights.get(&self.key).is_some_and(|(number, _)| *number == self.number)
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        let mut under_way = self.flights.under_way();
        // After a change, the same question may be under way anew.
        if under_way.flights.get(&self.key).is_some_and(|(number, _)| *number == self.number) {
            under_way.flights.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use hickory_proto::rr::{Name, RecordType};
    use tokio::sync::watch;

    use super::{super::key::wire_name, *};

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    fn key(text: &str) -> Key {
        Key::new(&name(text), RecordType::A, false, false)
    }

    /// Questions that stay under way until told otherwise, and what each then says of itself.
    struct Asking {
        flights: Arc<Flights>,
        land: watch::Sender<bool>,
        started: Arc<AtomicUsize>,
    }

    impl Asking {
        fn new() -> Self {
            Self { flights: Arc::default(), land: watch::Sender::new(false), started: Arc::default() }
        }

        fn ask(&self, text: &str) -> Result<Flight, QueryError> {
            let (mut land, started) = (self.land.subscribe(), Arc::clone(&self.started));
            self.flights.join(&key(text), &Handle::current(), move |landing| async move {
                started.fetch_add(1, Ordering::Relaxed);
                let _ = land.wait_for(|land| *land).await;
                Err(QueryError::Unreadable(landing.is_current().to_string()))
            })
        }

        async fn landed(&self, flights: Vec<Flight>) -> Vec<String> {
            self.land.send_replace(true);
            let landed = futures_util::future::join_all(flights).await;
            landed.into_iter().map(|landed| landed.unwrap_err().to_string()).collect()
        }
    }

    #[tokio::test]
    async fn a_question_is_asked_once_at_a_time() {
        let asking = Asking::new();
        let flights = vec![asking.ask("web.net.example.").unwrap(), asking.ask("WEB.net.example.").unwrap()];
        assert_eq!(asking.landed(flights).await, ["true", "true"]);
        assert_eq!(asking.started.load(Ordering::Relaxed), 1);
        // It has landed.
        let again = asking.ask("web.net.example.").unwrap();
        assert_eq!(asking.landed(vec![again]).await, ["true"]);
        assert_eq!(asking.started.load(Ordering::Relaxed), 2);
        assert!(asking.flights.under_way().flights.is_empty());
    }

    #[tokio::test]
    async fn after_a_change_it_is_asked_anew_and_the_older_answer_is_known_as_such() {
        let asking = Asking::new();
        let ask = |text| asking.ask(text).unwrap();
        let mut flights =
            vec![ask("a.web.net.example."), ask("db.net.example."), ask("7.0.64.100.in-addr.arpa.")];
        // They are under way before the change, not only planned.
        while asking.started.load(Ordering::Relaxed) < 3 {
            tokio::task::yield_now().await;
        }
        asking.flights.outdate(&wire_name(&name("web.net.example.")));
        flights.push(ask("a.web.net.example."));
        assert_eq!(asking.landed(flights).await, ["false", "true", "false", "true"]);
        assert!(asking.flights.under_way().flights.is_empty());
    }

    #[tokio::test]
    async fn they_are_bounded() {
        let asking = Asking::new();
        let flights: Vec<_> =
            (0..FLIGHTS_MAX).map(|n| asking.ask(&format!("n{n}.example.")).unwrap()).collect();
        assert!(matches!(asking.ask("one-more.example."), Err(QueryError::Busy)));
        assert!(asking.ask("n7.example.").is_ok());
        assert_eq!(asking.landed(flights).await.len(), FLIGHTS_MAX);
    }

    /// Listeners' threads ask for a little longer than the runtime runs.
    #[test]
    fn a_runtime_that_is_gone_is_an_error() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let handle = runtime.handle().clone();
        drop(runtime);
        let flight = Arc::<Flights>::default().join(&key("web.example."), &handle, |landing| async move {
            drop(landing);
            Err(QueryError::Busy)
        });
        let landed = flight.unwrap().now_or_never();
        assert!(matches!(landed, Some(Err(QueryError::Unreadable(_)))), "{landed:?}");
    }
}
