//! The registrar's file system is read-only: from an error that the kernel found, or from the start.

use muster_integration_tests::{expect, scenario};
use tonic::Code;

use crate::{
    disk::Disk,
    served::{Served, data},
};

#[test]
fn a_file_system_that_becomes_read_only_is_only_read() {
    scenario("read-only", |lab| {
        let host = lab.host("hq")?;
        lab.switch("lan")?.plug(&host, &["10.1.0.1/24"])?;
        let Some(disk) = Disk::ext4(&data(&host))? else {
            eprintln!("skipped: an ext4 cannot be mounted here, which needs root and loop devices");
            return Ok(());
        };
        let mut served = Served::start(&host)?;
        served.writes()?;
        let process = served.process()?;
        disk.break_ext4()?;
        served.refuses(Code::Unavailable, &["is read-only", "mount it read-write"])?;
        served.shows(Some(("read_only", "is read-only")))?;
        served.reads(&[])?;
        expect(served.process()? == process, "it is the same process", "")?;
        // A restart does not help, and says so; a repair does.
        served.registrar.kill();
        served.starts_or_says("ead-only")?;
        served.registrar.kill();
        disk.repair()?;
        served.restarts()
    });
}

#[test]
fn a_registrar_on_a_read_only_file_system_says_so() {
    scenario("read-only at the start", |lab| {
        let host = lab.host("hq")?;
        lab.switch("lan")?.plug(&host, &["10.1.0.1/24"])?;
        let disk = Disk::memory(&data(&host), 8192)?;
        let mut served = Served::start(&host)?;
        served.writes()?;
        served.registrar.kill();
        disk.remount("ro")?;
        served.starts_or_says("Read-only file system")?;
        served.registrar.kill();
        disk.remount("rw")?;
        served.restarts()
    });
}
