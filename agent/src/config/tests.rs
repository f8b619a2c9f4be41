//! What configuration is taken, and what is not.

use super::*;

#[test]
fn defaults_print_and_load_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.toml");
    std::fs::write(&path, config::print(&Config::default())).unwrap();
    assert_eq!(Config::load(Some(&path)).unwrap(), Config::default());
}

#[test]
fn bad_values_name_key_and_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.toml");
    for (text, parts) in [
        ("[interface]\nname = \"\"\n", ["interface.name", "muster0"]),
        ("[interface]\nname = \"a/b\"\n", ["interface.name", "muster0"]),
        ("[interface]\nmtu = 576\n", ["interface.mtu", "1280"]),
        ("[tunnel]\nthreads = 65\n", ["tunnel.threads", "1 to 64"]),
        ("[resolver]\nlisten = []\n", ["resolver.listen", "enabled"]),
        ("[resolver]\nupstream = [\"dns.example\"]\n", ["resolver.upstream", "IP address"]),
        ("[resolver]\nhost = \"dnsmasq\"\n", ["host", "resolv.conf"]),
        ("[resolver]\ncache_octets = 5\n", ["resolver.cache_octets", "65536"]),
        ("[resolver]\nttl_max = 0\n", ["resolver.ttl_max", "604800"]),
        ("[resolver]\nttl_min = 1801\n", ["resolver.ttl_min", "negative_ttl_max"]),
        ("[resolver]\nprefetch_percentage = 0\n", ["resolver.prefetch_percentage", "90"]),
        ("[resolver]\nndots = 5\n", ["resolver.ndots", "0 to 2"]),
        ("[resolver]\nsearch = [\"a..b\"]\n", ["resolver.search", "default.svc"]),
        ("[[resolver.stub]]\nservers = [\"192.0.2.1\"]\n", ["resolver.stub.domain", "corp.example"]),
        ("[[resolver.stub]]\ndomain = \"a.b\"\n", ["resolver.stub.servers", "at least one"]),
        ("[[resolver.stub]]\ndomain = \"a.b\"\nservers = [\"x\"]\n", ["resolver.stub.servers", "IP address"]),
        (
            "[[resolver.stub]]\ndomain = \"a.b\"\nservers = [\"192.0.2.1\"]\ntransport = \"tls\"\n",
            ["resolver.stub.server_name", "certificate"],
        ),
        ("[[resolver.stub]]\ntransport = \"https\"\n", ["transport", "agent.toml"]),
        ("[site]\nhosts = [{ name = \"a.b\", address = \"192.0.2.1\" }]\n", ["site.hosts.name", "printer"]),
        ("[site]\nhosts = [{ name = \"a\", address = \"a\" }]\n", ["site.hosts.address", "192.168.7.9"]),
        (
            "[site]\nhosts = [{ name = \"a\", address = \"::2\" }, { name = \"A\", address = \"::3\" }]\n",
            ["site.hosts", "once"],
        ),
        ("[site]\nsubnets = [\"192.168.7.9/24\"]\n", ["site.subnets", "192.168.7.0/24"]),
        ("[site]\nsubnets = [\"0.0.0.0/0\"]\n", ["site.subnets", "/8"]),
        ("[tunel]\nport = 1\n", ["tunel", "agent.toml"]),
        ("[http]\nlisten = \"localhost\"\n", ["listen", "agent.toml"]),
    ] {
        std::fs::write(&path, text).unwrap();
        let error = Config::load(Some(&path)).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
    assert!(Config::load(Some(Path::new("/none.toml"))).unwrap_err().to_string().contains("/none.toml"));
}

#[test]
fn servers_have_the_port_of_their_transport_unless_told() {
    let text = "[resolver]\nupstream = [\"192.0.2.1\", \"[2001:db8::1]:5353\"]\n\
                [[resolver.stub]]\ndomain = \"corp.example\"\nservers = [\"192.0.2.7\"]\n\
                [[resolver.stub]]\ndomain = \"a.corp.example\"\nservers = [\"192.0.2.8\", \"192.0.2.9:53\"]\n\
                transport = \"tls\"\nserver_name = \"dns.example\"\n";
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.toml");
    std::fs::write(&path, text).unwrap();
    let settings = Config::load(Some(&path)).unwrap().resolver.settings().unwrap();
    let parse = |list: &[&str]| list.iter().map(|a| a.parse().unwrap()).collect::<Vec<SocketAddr>>();
    assert_eq!(settings.upstream, parse(&["192.0.2.1:53", "[2001:db8::1]:5353"]));
    let [plain, tls] = &settings.stubs[..] else { panic!("{:?}", settings.stubs) };
    assert_eq!(plain.servers, parse(&["192.0.2.7:53"]));
    assert_eq!(tls.servers, parse(&["192.0.2.8:853", "192.0.2.9:53"]));
    assert_eq!((tls.server_name.as_str(), tls.ca.to_str()), ("dns.example", Some(SYSTEM_CA)));
}
