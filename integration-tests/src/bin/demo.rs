//! `make demo`: three hosts in network namespaces become a Muster network, step by step, in plain words.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "talking is what this program is for")]

use std::{process::ExitCode, time::Duration};

use muster_integration_tests::{
    Host, Lab, Result,
    muster::{Agent, Registrar},
    process::wait_for,
    router::Router,
};

const DOMAIN: &str = "net.example";
const REGISTRAR: &str = "198.51.100.10";

fn main() -> ExitCode {
    match demo() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nThe demo failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn demo() -> Result {
    let lab = Lab::new()?;

    say("Three hosts, on three different networks, joined by a router");
    let (core, lan_a, lan_b) = (lab.switch("core")?, lab.switch("lan-a")?, lab.switch("lan-b")?);
    let gateway = lab.host("gateway")?;
    let (headquarters, alice, bob) = (lab.host("hq")?, lab.host("alice")?, lab.host("bob")?);
    core.plug(&gateway, &["198.51.100.1/24"])?;
    lan_a.plug(&gateway, &["192.168.1.1/24"])?;
    lan_b.plug(&gateway, &["192.168.2.1/24"])?;
    Router::new(gateway)?;
    core.plug(&headquarters, &["198.51.100.10/24"])?;
    headquarters.route("default via 198.51.100.1")?;
    lan_a.plug(&alice, &["192.168.1.10/24"])?;
    alice.route("default via 192.168.1.1")?;
    lan_b.plug(&bob, &["192.168.2.20/24"])?;
    bob.route("default via 192.168.2.1")?;
    tell("hq     198.51.100.10   will run the registrar");
    tell("alice  192.168.1.10    a device");
    tell("bob    192.168.2.20    a device");

    say("hq: muster-registrar init, then serve");
    let mut registrar = Registrar::init(&headquarters, DOMAIN, REGISTRAR, "")?;
    quote(&registrar.printed);
    registrar.serve()?;

    say("alice joins with the command that init printed; bob with one from `muster create token`");
    let mut agents = [Agent::new(&alice, "")?, Agent::new(&bob, "")?];
    quote(&agents[0].join(&registrar.join_command()?, "alice")?);
    quote(&agents[1].join(&registrar.new_join_command(&[])?, "bob")?);
    for agent in &mut agents {
        agent.run()?;
    }
    quote(&registrar.muster(&["get", "devices", "-o", "wide"])?);

    say(
        "One DNS request tells alice three things about bob: his virtual address, his private address, and the address of his route director",
    );
    command("alice", &alice, &format!("dig +noall +answer +additional bob.{DOMAIN}"))?;

    say(
        "They reach each other by name, through an encrypted tunnel, with programs that know nothing of Muster",
    );
    let _web = [serve_page(&alice, "alice")?, serve_page(&bob, "bob")?];
    command("alice", &alice, &format!("ping -c 3 -i 0.2 bob.{DOMAIN}"))?;
    command("bob", &bob, &format!("ping -c 3 -i 0.2 alice.{DOMAIN}"))?;
    command("alice", &alice, &format!("curl -sS http://bob.{DOMAIN}:8000/"))?;
    command("bob", &bob, &format!("curl -sS http://alice.{DOMAIN}:8000/"))?;

    say("alice's agent tells how it reaches bob");
    quote(&agents[0].ask(&["status"])?);

    say("The registrar goes away, and nothing stops");
    registrar.stop()?;
    command("alice", &alice, &format!("curl -sS http://bob.{DOMAIN}:8000/"))?;

    say("Done. Everything is removed again.");
    for agent in &mut agents {
        agent.stop()?;
    }
    Ok(())
}

fn serve_page(host: &Host, name: &str) -> Result<muster_integration_tests::Process> {
    let directory = host.directory().join("www");
    host.sh(&format!("mkdir -p {0} && echo 'hello from {name}' > {0}/index.html", directory.display()))?;
    let mut server = host.command("python3");
    server.args(["-m", "http.server", "8000", "--bind", "::", "--directory"]).arg(&directory);
    let process = host.spawn("http", server)?;
    wait_for("the web server", Duration::from_secs(10), || {
        host.sh("curl -s http://127.0.0.1:8000/").map_err(|e| e.to_string())
    })?;
    Ok(process)
}

fn command(on: &str, host: &Host, script: &str) -> Result {
    println!("   {on}$ {script}");
    quote(&host.sh(script)?);
    Ok(())
}

fn say(text: &str) {
    println!("\n== {text}");
}

fn tell(text: &str) {
    println!("   {text}");
}

fn quote(text: &str) {
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        println!("   | {line}");
    }
}
