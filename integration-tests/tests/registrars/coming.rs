//! A registrar comes with one command on each of two hosts, and goes with one.

use muster_integration_tests::{
    Result, expect,
    muster::Registrar,
    process::{self, wait_for},
};

use crate::site::{PATIENCE, REGISTRARS, files, wait_connected, with_site};

#[test]
fn a_registrar_comes_with_one_command_and_goes_with_one() {
    with_site("a registrar comes and goes", |site| {
        let second = site.hosts[1].clone();
        let mut registrar = Registrar::empty(&second)?;
        let join = site.first.invite()?;

        // With another CA's hash, nothing is sent; with another secret, nothing is got; nothing is left behind.
        let ca_hash = format!("sha256:{}", "0".repeat(64));
        let token = join.option("token").unwrap_or_default();
        let wrong = format!("{}{}", &token[..token.len() - 4], "aaaa");
        for (bad, says) in
            [(join.with("ca-hash", &ca_hash), "CA hash"), (join.with("token", &wrong), "invitation")]
        {
            let output = process::run(registrar.join_deployment(&bad, REGISTRARS[1])?)?;
            expect(!output.status.success() && output.stderr.contains(says), "a refusal", &output.stderr)?;
            let left = files(&second, &registrar.data())?;
            expect(
                left.is_empty() && !registrar.config().exists(),
                "nothing left behind",
                &format!("{left:?}"),
            )?;
        }

        registrar.printed = process::check(registrar.join_deployment(&join, REGISTRARS[1])?)?;
        expect(
            registrar.printed.contains("muster-registrar serve --config")
                && registrar.printed.contains("etcd https://"),
            "what was done and what is next",
            &registrar.printed,
        )?;
        let made = files(&second, &registrar.data())?;
        expect(
            made == [
                "ca.crt",
                "ca.key",
                "etcd/ca.pem",
                "etcd/cert.pem",
                "etcd/key.pem",
                "lock",
                "registrar.pem",
            ],
            "the files of a registrar",
            &format!("{made:?}"),
        )?;
        let others = second.sh(&format!("find {} -type f ! -perm 600", registrar.data().display()))?;
        expect(others.is_empty(), "files that nobody else reads", &others)?;

        // Whoever comes second with the same command gets nothing, and who has joined does not join again.
        let third = Registrar::empty(&site.hosts[2])?;
        let output = process::run(third.join_deployment(&join, REGISTRARS[2])?)?;
        expect(
            !output.status.success() && output.stderr.contains("another host"),
            "used once",
            &output.stderr,
        )?;
        expect(files(&site.hosts[2], &third.data())?.is_empty(), "nothing left behind", "")?;
        let output = process::run(registrar.join_deployment(&join, REGISTRARS[1])?)?;
        expect(!output.status.success() && output.stderr.contains("already"), "joined once", &output.stderr)?;

        registrar.serve()?;
        let command = site.first.new_join_command(&["--reusable"])?;
        let mut agent = site.agent("alice", REGISTRARS[1], 20, &command)?;
        agent.run()?;
        wait_connected(&agent)?;
        let at_second = ["get", "devices", "--registrar", &format!("{}:7500", REGISTRARS[1])];
        wait_for("the device at both registrars", PATIENCE, || {
            let both = site.first.muster(&["get", "devices"]).map_err(|e| e.to_string())?
                + &site.first.muster(&at_second).map_err(|e| e.to_string())?;
            if both.matches("alice").count() == 2 { Ok(()) } else { Err(both) }
        })?;

        let name_servers = |count| {
            wait_for("the zone to have its name servers", PATIENCE, || {
                let told = site.hosts[0].sh("dig +short @127.0.0.1 ns.dns.net.example A");
                let told = told.map_err(|e| e.to_string())?;
                let all = REGISTRARS[..count].iter().all(|registrar| told.contains(registrar));
                if all && told.lines().count() == count { Ok(()) } else { Err(told) }
            })
        };
        name_servers(2)?;

        // It goes: not while it runs, and then all at once.
        let output = registrar.try_ask(&["leave"])?;
        expect(
            !output.status.success() && output.stderr.contains("stop it first"),
            "it runs",
            &output.stderr,
        )?;
        registrar.stop()?;
        let left = registrar.ask(&["leave"])?;
        expect(left.contains("no registrar any more"), "it has left", &left)?;
        name_servers(1)?;
        let files_left = files(&second, &registrar.data())?;
        expect(
            files_left.is_empty() && !registrar.config().exists(),
            "nothing left",
            &format!("{files_left:?}"),
        )?;
        expect(site.first.muster(&["get", "devices"])?.contains("alice"), "the registry is as it was", "")?;

        // The one that remains has the only key, and stays; the one that has left may come again.
        site.first.stop()?;
        let output = site.first.try_ask(&["leave"])?;
        expect(
            !output.status.success() && output.stderr.contains("only copy"),
            "the last one",
            &output.stderr,
        )?;
        site.first.serve()?;
        registrar.printed = process::check(registrar.join_deployment(&site.first.invite()?, REGISTRARS[1])?)?;
        registrar.serve()
    });
}

#[test]
fn what_is_lost_on_the_way_is_fetched_again() {
    with_site("an invitation whose answer is of no use at first", |site| {
        let second = site.hosts[1].clone();
        let registrar = Registrar::empty(&second)?;
        let join = site.first.invite()?;
        // The new host does not reach etcd yet.
        second.route("unreachable 198.51.100.1/32")?;
        let output = process::run(registrar.join_deployment(&join, REGISTRARS[1])?)?;
        expect(
            !output.status.success() && output.stderr.contains("run the same command again"),
            "says so",
            &output.stderr,
        )?;
        let left = files(&second, &registrar.data())?;
        expect(left == ["joining", "lock"], "no key is left behind", &format!("{left:?}"))?;
        second.sh("ip route del unreachable 198.51.100.1/32")?;
        process::check(registrar.join_deployment(&join, REGISTRARS[1])?).map(drop)
    });
}

/// With a sqlite store there is one registrar.
#[test]
fn a_sqlite_registrar_invites_nobody() {
    muster_integration_tests::scenario("sqlite invites nobody", |lab| -> Result {
        let host = lab.host("alone")?;
        let registrar = Registrar::init(&host, "net.example", "127.0.0.1", "")?;
        let output = registrar.try_ask(&["invite"])?;
        expect(
            !output.status.success() && output.stderr.contains("muster-registrar migrate"),
            "refused",
            &output.stderr,
        )
    });
}
