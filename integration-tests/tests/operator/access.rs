//! How an operator gets in, and who does not: credentials, plain gRPC, completions and man pages.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use muster_integration_tests::{
    Lab, Result,
    muster::{Agent, Registrar, binary},
    process, scenario,
};

use crate::{ADDRESS, fails, registrar, write, wrong};

/// A credential file with what `change` makes of the operator's.
fn credential(
    registrar: &Registrar,
    lab: &Lab,
    name: &str,
    change: impl Fn(String) -> String,
) -> Result<PathBuf> {
    let text = fs::read_to_string(registrar.credential()).map_err(|e| wrong("the credential", e))?;
    let path = lab.directory().join(name);
    write(&path, &change(text))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(|e| wrong("chmod", e))?;
    Ok(path)
}

#[test]
fn credentials_of_every_bad_kind_are_refused() {
    scenario("credentials", |lab| {
        let (mut registrar, hq) = registrar(lab)?;
        let muster = binary("muster")?;
        let ask = |prefix: &str, path: &Path| {
            hq.try_sh(&format!(
                "{prefix} {} --credential {} --request-timeout 5s get devices",
                muster.display(),
                path.display()
            ))
        };
        let missing = hq.try_sh(&format!(
            "HOME=/nowhere XDG_CONFIG_HOME= MUSTER_CREDENTIAL= MUSTER_REGISTRAR= {} get devices",
            muster.display()
        ))?;
        if !Path::new("/etc/muster/operator.toml").exists() {
            fails(
                &missing,
                1,
                &["no operator credential", "/nowhere/.config/muster/operator.toml", "--credential"],
            )?;
        }
        fails(&ask("", Path::new("/nowhere.toml"))?, 1, &["/nowhere.toml"])?;
        fails(
            &ask("", &credential(&registrar, lab, "junk.toml", |_| "junk".into())?)?,
            1,
            &["junk.toml", "not an operator credential"],
        )?;
        let cut =
            credential(&registrar, lab, "cut.toml", |text| text.replace("BEGIN PRIVATE", "BEGIN PUBLIC"))?;
        let output = ask("", &cut)?;
        fails(&output, 1, &["cut.toml", "not an operator credential"])?;
        assert!(!output.stderr.contains("BEGIN"), "keys are not quoted: {output:?}");

        // Others must not be able to read the key.
        let open = credential(&registrar, lab, "open.toml", |text| text)?;
        fs::set_permissions(&open, fs::Permissions::from_mode(0o644)).map_err(|e| wrong("chmod", e))?;
        fails(&ask("", &open)?, 1, &["others can read it (mode 644)", "chmod 600"])?;
        fs::set_permissions(&open, fs::Permissions::from_mode(0o600)).map_err(|e| wrong("chmod", e))?;
        let found =
            hq.try_sh(&format!("MUSTER_CREDENTIAL={} {} get devices", open.display(), muster.display()))?;
        assert!(found.status.success(), "{found:?}");

        // Expired, or a clock that is wrong.
        fails(&ask("faketime -f +2y", &open)?, 1, &["expired at", "muster-registrar credential --output"])?;
        fails(&ask("faketime -f -2y", &open)?, 1, &["clock"])?;

        // Of another deployment: neither side trusts the other, and nothing is told.
        let other = lab.host("other")?;
        let stranger = Registrar::init(&other, "other.example", ADDRESS, "")?;
        fails(&ask("", &stranger.credential())?, 1, &["not from a CA that we trust", "same deployment"])?;
        // Even when it is made to trust this registrar.
        let roots =
            |text: &str| text.split_once("roots = ").map(|(_, roots)| roots.to_owned()).unwrap_or_default();
        let own = fs::read_to_string(registrar.credential()).map_err(|e| wrong("the credential", e))?;
        let forged =
            credential(&stranger, lab, "forged.toml", |text| text.replace(&roots(&text), &roots(&own)))?;
        let output = ask("", &forged)?;
        assert!(output.status.code() == Some(1) && output.stdout.is_empty(), "{output:?}");

        // A device is no operator.
        let agent = Agent::new(&hq, "")?;
        agent.join(&registrar.join_command()?, "web")?;
        let program = "import json, sys\n\
            text = open(sys.argv[1]).read()\n\
            v = json.loads(text[text.index(\"{\"):])\n\
            key = [v[k] for k in v if isinstance(v[k], str) and \"PRIVATE KEY\" in v[k]][0]\n\
            q = json.dumps\n\
            print(\"registrar =\", q(v[\"registrar\"]), \"\\nnetwork = \\\"default\\\"\\ncertificate =\", q(v[\"certificate_chain\"]), \"\\nkey =\", q(key))\n";
        let script = write(&lab.directory().join("identity.py"), program)?;
        let device = hq.sh(&format!("python3 {script} {}", agent.state().join("identity").display()))?;
        let device =
            credential(&registrar, lab, "device.toml", |text| format!("{device}roots = {}", roots(&text)))?;
        fails(&ask("", &device)?, 1, &["not allowed to list devices", "operator"])?;

        // Nobody there.
        registrar.stop()?;
        fails(&ask("", &open)?, 1, &["198.51.100.10:7500", "refused", "systemctl status muster-registrar"])?;
        let version = registrar.try_muster(&["version"])?;
        assert!(
            version.status.code() == Some(1) && version.stdout.starts_with("Client version: "),
            "{version:?}"
        );
        fails(
            &registrar.try_muster(&["--registrar", "nowhere", "get", "devices"])?,
            1,
            &["HOST:PORT", "--registrar"],
        )?;
        // A new credential is made beside the registrar, whether it runs or not.
        let mut make = hq.command(binary("muster-registrar")?);
        let alice = lab.directory().join("alice.toml");
        make.args(["credential", "--name", "alice", "--output"])
            .arg(&alice)
            .arg("--config")
            .arg(registrar.config());
        process::check(make)?;
        registrar.serve()?;
        let output = ask("", &alice)?;
        assert!(output.status.success(), "{output:?}");
        Ok(())
    });
}

#[test]
fn health_and_reflection_are_there_for_any_grpc_client() {
    scenario("plain gRPC", |lab| {
        let (registrar, hq) = registrar(lab)?;
        // A client that knows nothing of Muster: curl speaks HTTP/2, and the messages are a few octets.
        let split = "import sys, tomllib as t\n\
            v = t.load(open(sys.argv[1], \"rb\"))\n\
            open(sys.argv[2], \"w\").write(v[\"certificate\"] + v[\"key\"])\n";
        let script = write(&lab.directory().join("split.py"), split)?;
        let pem = lab.directory().join("operator.pem").display().to_string();
        hq.sh(&format!("python3 {script} {} {pem}", registrar.credential().display()))?;
        let call = |certificate: &str, method: &str, message: &str| {
            hq.try_sh(&format!(
                "printf '{message}' | curl -sS -k --http2 {certificate} -H 'content-type: application/grpc' \
                 -H 'te: trailers' --max-time 20 --data-binary @- -D /dev/stderr https://{ADDRESS}:7500/{method} | tr -cd '[:print:]'"
            ))
        };
        let with = format!("--cert {pem}");
        let health = call(&with, "grpc.health.v1.Health/Check", "\\000\\000\\000\\000\\000")?;
        assert!(health.stderr.contains("HTTP/2 200"), "{health:?}");
        for version in ["v1", "v1alpha"] {
            // ServerReflectionRequest { list_services: "" }, 2 octets.
            let method = format!("grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
            let listed = call(&with, &method, "\\000\\000\\000\\000\\002\\072\\000")?;
            if version == "v1" {
                for service in [
                    "muster.admin.v1.DeviceService",
                    "muster.admin.v1.NetworkService",
                    "muster.admin.v1.TokenService",
                    "muster.enrollment.v1.EnrollmentService",
                    "muster.registration.v1.RegistrationService",
                    "grpc.health.v1.Health",
                ] {
                    assert!(listed.stdout.contains(service), "{service}: {listed:?}");
                }
            }
        }
        // Without a certificate, the admin API has nothing to say.
        let stranger = call("", "muster.admin.v1.NetworkService/ListNetworks", "\\000\\000\\000\\000\\000")?;
        assert!(!stranger.stdout.contains("net.example"), "{stranger:?}");
        let operator =
            call(&with, "muster.admin.v1.NetworkService/ListNetworks", "\\000\\000\\000\\000\\000")?;
        assert!(operator.stdout.contains("net.example"), "{operator:?}");
        let version = registrar.muster(&["version"])?;
        assert!(version.contains("(SERVING)"), "{version}");
        Ok(())
    });
}

#[test]
fn completions_load_and_man_pages_render() {
    scenario("completions", |lab| {
        let host = lab.host("desk")?;
        for (program, word, pages) in [
            ("muster", "get", &["muster", "muster-get", "muster-create-token"][..]),
            ("muster-agent", "status", &["muster-agent", "muster-agent-join"]),
            ("muster-registrar", "serve", &["muster-registrar", "muster-registrar-init"]),
        ] {
            let path = binary(program)?;
            // Sourced by a bash that stops at the first error; then asked as bash asks it.
            let completed = host.sh(&format!(
                "bash -euc 'source <({path} completion bash)\n\
                 complete -p {program} >/dev/null\n\
                 COMP_WORDS=({program} {start}) COMP_CWORD=1\n\
                 function=$(complete -p {program} | sed \"s/.*-F //; s/ .*//\")\n\
                 set +eu; $function {program} {start} {program}; echo \"${{COMPREPLY[@]}}\"'",
                path = path.display(),
                start = &word[..2],
            ))?;
            assert!(completed.split_whitespace().any(|found| found == word), "{program}: {completed:?}");
            for shell in ["zsh", "fish"] {
                let script = host.sh(&format!("{} completion {shell}", path.display()))?;
                assert!(script.contains(program), "{script}");
            }
            let directory = lab.directory().join("man1");
            host.sh(&format!("{} man --dir {}", path.display(), directory.display()))?;
            for page in pages {
                let text = host.sh(&format!(
                    "LC_ALL=C.UTF-8 MANWIDTH=100 MAN_KEEP_FORMATTING= man --warnings -l {}/{page}.1 2>&1",
                    directory.display()
                ))?;
                assert!(text.contains("NAME") && text.contains("Example"), "{page}: {text}");
                assert!(!text.contains("warning:"), "{page}: {text}");
            }
        }
        Ok(())
    });
}
