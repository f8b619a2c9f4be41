//! The disk fails while the registrar writes: in fsync, after which nobody knows what is on disk, and in the write itself.

use muster_integration_tests::{Lab, Result, expect, scenario};
use tonic::Code;

use crate::{disk::Injection, served::Served};

fn broken(lab: &Lab, calls: &str) -> Result {
    let host = lab.host("hq")?;
    lab.switch("lan")?.plug(&host, &["10.1.0.1/24"])?;
    let mut served = Served::start(&host)?;
    // Both whether it goes on when the disk works again, and whether it is killed before.
    for killed in [false, true] {
        served.writes()?;
        let process = served.process()?;
        let injection = Injection::start(&host, process, calls, "EIO")?;
        served.refuses(Code::Unavailable, &["the disk failed", "dmesg"])?;
        served.shows(Some(("disk", "the disk failed")))?;
        served.reads(&[])?;
        expect(served.process()? == process, "it is the same process", "")?;
        if killed {
            served.registrar.kill();
            drop(injection);
            served.registrar.serve()?;
        } else {
            injection.stop()?;
            served.shows(None)?;
        }
        served.holds()?;
        served.writes()?;
        served.sound()?;
        served.restarts()?;
    }
    Ok(())
}

#[test]
fn an_fsync_that_fails_loses_nothing() {
    scenario("fsync fails", |lab| broken(lab, "fsync,fdatasync"));
}

#[test]
fn a_write_that_fails_loses_nothing() {
    scenario("write fails", |lab| broken(lab, "pwrite64"));
}
