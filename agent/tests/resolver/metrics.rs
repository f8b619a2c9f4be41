//! What the resolver tells at `/metrics`, to the letter: dashboards and alerts made for CoreDNS depend on it.

use muster_common::telemetry::{self, Readiness};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{forwarding::ask, *};

/// Where the metrics are documented.
const OPERATING: &str = include_str!("../../../docs/operating.md");

/// What a scrape of `metrics` brings.
async fn scrape(metrics: &telemetry::Metrics) -> String {
    let listener = tokio::net::TcpListener::bind(ANY_PORT).await.unwrap();
    let mut stream = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let serving = tokio::spawn(telemetry::serve(listener, metrics.clone(), Readiness::default()));
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    serving.abort();
    response
}

/// The metrics of this resolver that the documentation names, sorted.
fn documented() -> Vec<&'static str> {
    let chapter = OPERATING.split("\n## Metrics and health").nth(1).unwrap().split("\n## ").next().unwrap();
    let agent = chapter.split("Agent, each with the prefix `muster_agent_`").nth(1).unwrap();
    let agent = agent.split("Reasons of `datapath_drops_total`").next().unwrap();
    let ours = ["cache_", "forward_", "proxy_", "dns_"];
    let code = agent.split('`').skip(1).step_by(2).map(|code| code.split('{').next().unwrap());
    let mut names: Vec<&str> =
        code.filter(|name| ours.iter().any(|prefix| name.starts_with(prefix))).collect();
    names.sort_unstable();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_have_the_names_and_labels_of_coredns() {
    let authority = Authority::new();
    let (registrar, elsewhere) = (registrar(&authority, 60), server(Elsewhere));
    let metrics = telemetry::Metrics::with_prefix("muster_agent");
    let mut started = None;
    metrics.register(|registry| {
        let settings = Settings { upstream: vec![elsewhere.address], ..Settings::default() };
        let registrars = [registrar.address.to_string()];
        started = Some(host_counted(&authority.credentials(DEVICE), &registrars, settings, registry));
    });
    let host = started.unwrap();
    host.ready().await;
    let mut garbage = [0; 12];
    garbage[2] = 0x80;
    let socket = tokio::net::UdpSocket::bind(ANY_PORT).await.unwrap();
    socket.send_to(&garbage, host.address).await.unwrap();
    for name in ["web.net.example.", "nobody.net.example.", "www.example.org.", "nx.example.org."] {
        for _ in 0..3 {
            ask(&host, name).await;
        }
    }
    ask(&host, "broken.example.org.").await;
    let (network, other) = (registrar.address, elsewhere.address);
    registrar.stop().await;
    host.resolver.invalidate("web");
    ask(&host, "web.net.example.").await;
    ask(&host, "unknown.net.example.").await;

    let scraped = scrape(&metrics).await;
    let own = format!("dns://{}", host.address);
    for line in [
        // CoreDNS' `cache`.
        r#"cache_requests_total{server="dns://",zones="network",view=""} 8"#.to_owned(),
        r#"cache_requests_total{server="dns://",zones=".",view=""} 7"#.to_owned(),
        r#"cache_misses_total{server="dns://",zones="network",view=""} 4"#.to_owned(),
        r#"cache_misses_total{server="dns://",zones=".",view=""} 3"#.to_owned(),
        r#"cache_hits_total{server="dns://",type="success",zones="network",view=""} 2"#.to_owned(),
        r#"cache_hits_total{server="dns://",type="denial",zones="network",view=""} 2"#.to_owned(),
        r#"cache_hits_total{server="dns://",type="success",zones=".",view=""} 2"#.to_owned(),
        r#"cache_hits_total{server="dns://",type="denial",zones=".",view=""} 2"#.to_owned(),
        r#"cache_served_stale_total{server="dns://",zones="network",view=""} 1"#.to_owned(),
        r#"cache_served_stale_total{server="dns://",zones=".",view=""} 0"#.to_owned(),
        r#"cache_prefetch_total{server="dns://",zones="network",view=""} 0"#.to_owned(),
        r#"cache_entries{server="dns://",type="success",zones=".",view=""} 2"#.to_owned(),
        r#"cache_entries{server="dns://",type="denial",zones=".",view=""} 2"#.to_owned(),
        r#"cache_evictions_total 0"#.to_owned(),
        // Its `forward`.
        r#"forward_failures_total{server="dns://",zones="network",view=""} 2"#.to_owned(),
        r#"forward_failures_total{server="dns://",zones=".",view=""} 1"#.to_owned(),
        r#"forward_max_concurrent_rejects_total 0"#.to_owned(),
        r#"forward_healthcheck_broken_total 0"#.to_owned(),
        answered(network, "NOERROR"),
        answered(network, "NXDOMAIN"),
        answered(other, "NOERROR"),
        answered(other, "NXDOMAIN"),
        answered(other, "SERVFAIL"),
        // Its server.
        format!(
            r#"dns_requests_total{{server="{own}",zone=".",view="",proto="udp",family="1",type="A"}} 15"#
        ),
        format!(
            r#"dns_responses_total{{server="{own}",zone=".",view="",rcode="NOERROR",plugin="muster"}} 7"#
        ),
        format!(
            r#"dns_responses_total{{server="{own}",zone=".",view="",rcode="NXDOMAIN",plugin="muster"}} 6"#
        ),
        format!(
            r#"dns_responses_total{{server="{own}",zone=".",view="",rcode="SERVFAIL",plugin="muster"}} 2"#
        ),
        format!(r#"dns_request_size_bytes_count{{server="{own}",zone=".",view="",proto="udp"}} 15"#),
        format!(r#"dns_response_size_bytes_count{{server="{own}",zone=".",view="",proto="udp"}} 15"#),
        format!(r#"dns_request_duration_seconds_count{{server="{own}",zone=".",view="",type="A"}} 15"#),
        format!(r#"dns_connections{{server="{own}",zone=".",view="",proto="tcp"}} 0"#),
        format!(r#"dns_dropped_total{{server="{own}",reason="malformed"}} 1"#),
    ] {
        let line = format!("muster_agent_{line}");
        assert!(scraped.lines().any(|scraped| scraped == line), "no {line} in\n{scraped}");
    }
    // And the documentation names all that there is, and nothing else.
    let kinds = scraped.lines().filter_map(|line| line.strip_prefix("# TYPE muster_agent_")?.split_once(' '));
    let names =
        kinds.map(|(name, kind)| if kind == "counter" { format!("{name}_total") } else { name.into() });
    // A family without members is not told of; this one has none until a server that was down stays so.
    let mut offered: Vec<String> = names.chain(["proxy_healthcheck_failures_total".into()]).collect();
    offered.sort_unstable();
    assert_eq!(documented(), offered);
}

/// That `server` has answered once with `rcode`.
fn answered(server: SocketAddr, rcode: &str) -> String {
    let labels = format!(r#"proxy_name="forward",to="{server}",rcode="{rcode}""#);
    format!("proxy_request_duration_seconds_count{{{labels}}} 1")
}
