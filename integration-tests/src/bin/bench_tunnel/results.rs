//! Samples of every measure and peer, and the figures made of them: medians, and Muster's ratio to each other peer.

use muster_integration_tests::{
    Result,
    figures::{Figures, median},
};

use crate::peers::Peer;

/// Which of two values is the better one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Better {
    More,
    Less,
}

struct Measure {
    name: String,
    unit: &'static str,
    better: Better,
    /// In the order in which peers had their first turns.
    peers: Vec<(Peer, Vec<f64>)>,
}

/// All samples so far.
#[derive(Default)]
pub(crate) struct Results {
    measures: Vec<Measure>,
    failed: Vec<(Peer, String, String)>,
}

impl Results {
    /// Adds a sample, and shows it.
    pub(crate) fn add(&mut self, name: &str, unit: &'static str, better: Better, peer: Peer, value: f64) {
        eprintln!("{name}, {}: {value:.3} {unit}", peer.name());
        let position = self.measures.iter().position(|measure| measure.name == name);
        let position = position.unwrap_or_else(|| {
            self.measures.push(Measure { name: name.to_owned(), unit, better, peers: Vec::new() });
            self.measures.len() - 1
        });
        let Some(measure) = self.measures.get_mut(position) else { return };
        match measure.peers.iter_mut().find(|(other, _)| *other == peer) {
            Some((_, samples)) => samples.push(value),
            None => measure.peers.push((peer, vec![value])),
        }
    }

    /// Notes how a turn of `peer` ended: one that fails does not end the run.
    pub(crate) fn note(&mut self, peer: Peer, what: &str, turn: Result) {
        if let Err(error) = turn {
            let error = error.to_string().replace(['\n', '\t'], " ");
            eprintln!("{what}, {}: {error}", peer.name());
            self.failed.push((peer, what.to_owned(), error));
        }
    }

    /// Whether no turn failed.
    pub(crate) fn complete(&self) -> bool {
        self.failed.is_empty()
    }

    /// Names of all measures.
    pub(crate) fn measures(&self) -> impl Iterator<Item = &str> {
        self.measures.iter().map(|measure| measure.name.as_str())
    }

    /// The median of what `peer` showed.
    pub(crate) fn median(&self, measure: &str, peer: Peer) -> Option<f64> {
        let measure = self.measures.iter().find(|other| other.name == measure)?;
        measure.medians().find(|(other, _)| *other == peer).map(|(_, value)| value)
    }

    /// Reports every measure: each peer's median, then Muster's beside each.
    pub(crate) fn report(&self, figures: &mut Figures) {
        for measure in &self.measures {
            measure.report(figures);
        }
        for (peer, what, why) in &self.failed {
            figures.missing(&format!("a turn of {what}, {}", peer.name()), why);
        }
    }
}

impl Measure {
    fn medians(&self) -> impl Iterator<Item = (Peer, f64)> {
        self.peers.iter().map(|(peer, samples)| (*peer, median(&mut samples.clone())))
    }

    fn report(&self, figures: &mut Figures) {
        let figure = |peer: Peer| format!("{}, {}", self.name, peer.name());
        let mut muster = None;
        let mut others = Vec::new();
        for (peer, value) in self.medians() {
            match peer {
                Peer::Muster => muster = Some(value),
                Peer::None => figures.report(&figure(peer), value, self.unit),
                _ => {
                    figures.report(&figure(peer), value, self.unit);
                    others.push((peer, value));
                }
            }
        }
        let Some(muster) = muster else { return };
        if others.is_empty() {
            figures.report(&figure(Peer::Muster), muster, self.unit);
        }
        let tunnels = others.iter().filter(|(peer, _)| *peer != Peer::Copier);
        let best = match self.better {
            Better::More => tunnels.max_by(|a, b| a.1.total_cmp(&b.1)),
            Better::Less => tunnels.min_by(|a, b| a.1.total_cmp(&b.1)),
        };
        let best = best.map(|(peer, _)| *peer);
        for (peer, value) in others {
            let best = if best == Some(peer) { " (the best peer)" } else { "" };
            let with = format!("{}{best}", peer.name());
            figures.compare(&figure(Peer::Muster), muster, self.unit, &with, value);
        }
    }
}
