//! Tests of the grammar: what is understood, and what is a usage error.

use clap::CommandFactory;

use super::*;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(std::iter::once("muster").chain(line.split_whitespace()))
}

#[test]
fn the_grammar_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn what_operators_write_is_understood() {
    for line in [
        "get devices",
        "get devices -l role=web -o wide -n prod",
        "-n prod get devices",
        "get device/web token/x -A",
        "get devices -w --output-watch-events",
        "watch devices",
        "describe device web --network lab",
        "create token",
        "create token web --reusable --ttl 1h -l role=web,tier=a -l zone=b -n prod -o json",
        "create network lab --domain lab.example --public-address ::1 --director d=[::1]:1 --record-ttl 0",
        "create device web --virtual-ipv4 100.64.0.10 --virtual-ipv6 fd00::1",
        "create -f - -o name",
        "create namespace prod --dry-run -o yaml",
        "create ns prod",
        "create service clusterip my-cs --tcp=5678:8080 --tcp 443,80 --udp=53:dns",
        "create svc clusterip my-cs --clusterip=None",
        "create service nodeport my-ns --tcp=80 --dry-run=client",
        "create service loadbalancer my-lb --tcp=80:http",
        "create service externalname my-ns --external-name db.example.com",
        "apply -f x --dry-run=server",
        "apply -f a -f b --request-timeout 5s",
        "delete device web db --ignore-not-found",
        "delete tokens --all",
        "delete -f x",
        "label devices web role=db old- --overwrite",
        "annotate device/web a=b",
        "revoke token x",
        "create token --director",
        "create token d1 --director --reusable --ttl 1h",
        "drain director d1 -o name",
        "undrain dir/d1",
        "approve device gate",
        "approve devices gate-1 gate-2 --subnet 10.1.0.0/24,10.2.0.0/16 --subnet fd07::/64 --hosts",
        "approve dev/gate --all -o json",
        "disapprove device gate --hosts -o name",
        "create device gate --may-proxy --subnet 10.1.0.0/24",
        "version --client -o json",
        "completion bash",
        "man --dir x",
    ] {
        assert!(parse(line).is_ok(), "{line}: {}", parse(line).unwrap_err());
    }
}

#[test]
fn the_rest_is_a_usage_error() {
    for line in [
        "",
        "get",
        "gte devices",
        "get devices -o xml",
        "get devices -n a -A",
        "create",
        "create token -o wide",
        "create service",
        "create service clusterip",
        "create service clusterip x --tcp=0",
        "create service clusterip x --tcp=80:0",
        "create service clusterip x --tcp=80:a_b",
        "create service clusterip x --tcp=70000",
        "create service clusterip x --clusterip=10.0.0",
        "create service nodeport x",
        "create service externalname x",
        "create namespace",
        "delete device web -o json",
        "version -o name",
        "create token --ttl never",
        "create network lab",
        "create network lab --domain d --device-pool-v4 fd00::/48",
        "create network lab --domain d --director 1.2.3.4:5",
        "create device web --virtual-ipv4 100.64.0.300",
        "apply",
        "delete",
        "delete device web -f x",
        "delete devices -l a=b --all",
        "revoke",
        "drain",
        "approve",
        "approve device gate --all --hosts",
        "approve device gate --all --subnet 10.1.0.0/24",
        "approve device gate --subnet 10.1.0.5/24",
        "disapprove device gate --subnet 10.1.0.5",
        "create device gate --subnet 10.1.0.5/24",
        "create token --director -l a=b",
        "completion tcsh",
    ] {
        assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
    }
}

#[test]
fn every_command_has_help_with_an_example() {
    fn check(command: &clap::Command) {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        assert!(help.contains("Example"), "{}", command.get_name());
        assert!(command.get_about().is_some(), "{}", command.get_name());
        command.get_subcommands().for_each(check);
    }
    check(&Cli::command());
}
