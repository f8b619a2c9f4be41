//! A database that is no longer what it was: the registrar refuses it, says why, and leaves it as it is.

use std::fs;

use muster_integration_tests::{LabError, Result, expect, muster::Registrar, process::run, scenario};

#[test]
fn a_damaged_database_is_refused_and_left_alone() {
    scenario("damaged database", |lab| {
        let host = lab.host("hq")?;
        lab.switch("lan")?.plug(&host, &["10.1.0.1/24"])?;
        let mut registrar = Registrar::init(&host, "net.example", "10.1.0.1", "")?;
        registrar.serve()?;
        registrar.muster(&["create", "token"])?;
        registrar.stop()?;
        let path = registrar.data().join("registry.db");
        // All of it in one file: what is still in the log would make up for what the file has lost.
        host.sh(&format!("sqlite3 '{}' 'pragma wal_checkpoint(truncate)'", path.display()))?;
        let file = |source| LabError::File { path: path.display().to_string(), source };
        let good = fs::read(&path).map_err(file)?;
        let half = good.len() / 2;
        let garbage = |from: usize| {
            let mut octets = good.clone();
            octets
                .iter_mut()
                .skip(from)
                .zip([0x5A, 0xC3, 0x99].iter().cycle())
                .for_each(|(to, from)| *to = *from);
            octets
        };
        for (what, octets, part) in [
            ("emptied", Vec::new(), "is damaged"),
            ("cut short", good.iter().copied().take(half).collect(), "is damaged"),
            ("cut within its header", good.iter().copied().take(50).collect(), "is damaged"),
            ("overwritten", garbage(0), "is not a Muster database"),
            ("overwritten after its header", garbage(100), "is damaged"),
        ] {
            fs::write(&path, &octets).map_err(file)?;
            let mut command = host.command("timeout");
            command.arg("20").arg(muster_integration_tests::muster::binary("muster-registrar")?);
            command.arg("serve").arg("--config").arg(registrar.config());
            let output = run(command)?;
            let right = output.status.code() == Some(1) && output.stderr.contains(part);
            expect(right, &format!("a database that is {what} is refused"), &format!("{output:?}"))?;
            let left = fs::read(&path).map_err(file)?;
            expect(left == octets, &format!("a database that is {what} is left as it is"), "")?;
        }
        fs::write(&path, &good).map_err(file)?;
        registrar.serve()?;
        registrar.stop() as Result
    });
}
