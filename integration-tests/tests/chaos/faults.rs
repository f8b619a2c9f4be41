//! What fails, how it is made to, and how it is mended.

use muster_integration_tests::{Host, Result, failed, muster::Program};
use rand::{RngExt as _, rngs::StdRng, seq::IndexedRandom as _};
use rustix::process::Signal;

use crate::world::{MEMBERS, World};

/// By how much clocks are wrong, in seconds. Before its own root's time, which begins a quarter of an hour before it is made,
/// a registrar does not start.
const CLOCKS: std::ops::Range<i32> = -800..3600;

/// Something of the world, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Member(usize),
    Registrar(usize),
    Director(usize),
}

/// What befalls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Harm {
    /// `kill -9`, and started again.
    Kill,
    /// SIGSTOP, and SIGCONT.
    Freeze,
    /// No packet in or out.
    Cut,
    /// No packet to or from etcd.
    CutFromStore,
    /// An orderly stop, and started again.
    Stop,
    /// Started again with a clock that is wrong by so many seconds, and stays so.
    Clock(i32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    part: Part,
    harm: Harm,
}

impl Fault {
    /// What fails at the same time: mostly one thing, sometimes all of a kind.
    pub(crate) fn draw(rng: &mut StdRng) -> Vec<Self> {
        let harms = [Harm::Kill, Harm::Freeze, Harm::Cut];
        let harm = *harms.choose(rng).unwrap_or(&Harm::Kill);
        let each = |parts: Vec<Part>| parts.into_iter().map(|part| Self { part, harm }).collect();
        let one = |part, harm| vec![Self { part, harm }];
        match rng.random_range(0..16) {
            0..4 => one(Part::Member(rng.random_range(0..3)), harm),
            // Without quorum.
            4 => each((0..2).map(Part::Member).collect()),
            5..9 => one(Part::Registrar(rng.random_range(0..3)), harm),
            9 => one(Part::Registrar(rng.random_range(0..3)), Harm::CutFromStore),
            10 => one(Part::Registrar(rng.random_range(0..3)), Harm::Stop),
            11 => {
                let part = match rng.random_range(0..5) {
                    number @ 0..3 => Part::Registrar(number),
                    number => Part::Director(number - 3),
                };
                one(part, Harm::Clock(rng.random_range(CLOCKS)))
            }
            // Nobody home.
            12 => each((0..3).map(Part::Registrar).collect()),
            13 | 14 => one(Part::Director(rng.random_range(0..2)), harm),
            _ => vec![
                Self { part: Part::Member(rng.random_range(0..3)), harm },
                Self { part: Part::Registrar(rng.random_range(0..3)), harm: Harm::Kill },
                Self { part: Part::Director(rng.random_range(0..2)), harm: Harm::Freeze },
            ],
        }
    }

    pub(crate) fn inject(&self, world: &mut World) -> Result {
        match self.harm {
            Harm::Cut => cut(self.host(world), "drop"),
            Harm::CutFromStore => {
                let members = MEMBERS.join(", ");
                cut(
                    self.host(world),
                    &format!("ip saddr {{ {members} }} drop; ip daddr {{ {members} }} drop"),
                )
            }
            Harm::Freeze => self.signal(world, Signal::STOP),
            Harm::Kill | Harm::Clock(_) => {
                match self.part {
                    Part::Member(number) => world.members[number].kill(),
                    _ => self.program(world)?.kill(),
                }
                Ok(())
            }
            Harm::Stop => self.program(world)?.stop(),
        }
    }

    pub(crate) fn heal(&self, world: &mut World) -> Result {
        match self.harm {
            Harm::Cut | Harm::CutFromStore => self.host(world).sh("nft delete table inet cut").map(drop),
            Harm::Freeze => self.signal(world, Signal::CONT),
            Harm::Kill | Harm::Stop => self.start(world),
            Harm::Clock(seconds) => {
                self.program(world)?.set_environment("FAKETIME", &format!("{seconds:+}"));
                self.start(world)
            }
        }
    }

    /// Starts it; it may have to wait for others until it is ready.
    fn start(&self, world: &mut World) -> Result {
        match self.part {
            Part::Member(number) => world.members[number].start(),
            _ => self.program(world)?.start(),
        }
    }

    fn signal(&self, world: &mut World, signal: Signal) -> Result {
        match self.part {
            Part::Member(number) => world.members[number].signal(signal),
            _ => self.program(world)?.process().map_or(Ok(()), |process| process.signal(signal)),
        }
    }

    fn host<'a>(&self, world: &'a World) -> &'a Host {
        match self.part {
            Part::Member(number) => &world.members[number].host,
            Part::Registrar(number) => world.registrars[number].host(),
            Part::Director(number) => world.directors[number].host(),
        }
    }

    /// The program of Muster's that it is.
    fn program<'a>(&self, world: &'a mut World) -> Result<&'a mut Program> {
        match self.part {
            Part::Director(number) => Ok(&mut world.directors[number]),
            Part::Registrar(number) => Ok(&mut world.registrars[number]),
            Part::Member(_) => Err(failed(&format!("{self:?}"), "nothing does that to etcd")),
        }
    }
}

/// Has the host's kernel do `rule` to every packet that is not of the host's own.
fn cut(host: &Host, rule: &str) -> Result {
    let chain = |hook: &str, interface: &str| {
        format!("chain {hook} {{ type filter hook {hook} priority 0; {interface} \"lo\" accept; {rule}; }}; ")
    };
    let table = format!("table inet cut {{ {}{} }}", chain("input", "iifname"), chain("output", "oifname"));
    host.sh(&format!("echo '{table}' | nft -f -")).map(drop)
}
