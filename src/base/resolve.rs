//! Names of hosts to addresses, without the C library: getaddrinfo(3) loads foreign modules into a static binary.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_resolver::config::{LookupIpStrategy, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::{ResolverBuilder, TokioResolver};

use crate::error::{Error, Kind, Result};

const RESOLVE_SECONDS_MAX: u64 = 10;

/// The addresses behind `name:port` or `10.0.0.2:7420`, those of IPv4 first. A name that is not known is `Unreachable`:
/// it may be known later.
pub async fn resolve(address: &str) -> Result<Vec<SocketAddr>> {
    if let Ok(numeric) = address.parse::<SocketAddr>() {
        return Ok(vec![numeric]);
    }
    let bad = || Error::new(Kind::BadInput, format!("'{address}' is not an address with a port"));
    let (name, port) = address.rsplit_once(':').ok_or_else(bad)?;
    let port: u16 = port.parse().map_err(|_| bad())?;
    let unknown = |why: String| {
        Error::new(Kind::Unreachable, format!("cannot find the address of '{name}': {why}"))
            .hint("is the name right, and does 'getent hosts NAME' know it? an IP address always works")
    };
    // A new resolver each time: connections are kept, so this is rare, and changed files count at once.
    let resolver = resolver().map_err(|error| unknown(error.to_string()))?;
    let deadline = Duration::from_secs(RESOLVE_SECONDS_MAX);
    let found = tokio::time::timeout(deadline, resolver.lookup_ip(name))
        .await
        .map_err(|_| unknown(format!("no answer within {RESOLVE_SECONDS_MAX} seconds")))?
        .map_err(|error| unknown(error.to_string()))?;
    let mut found: Vec<IpAddr> = found.iter().collect();
    found.sort_by_key(IpAddr::is_ipv6);
    Ok(found.into_iter().map(|ip| SocketAddr::new(ip, port)).collect())
}

/// Asks the servers of `/etc/resolv.conf` after `/etc/hosts`; without the former only the latter.
fn resolver() -> std::result::Result<TokioResolver, hickory_resolver::net::NetError> {
    let mut builder: ResolverBuilder<_> = match TokioResolver::builder_tokio() {
        Ok(builder) => builder,
        Err(_) => TokioResolver::builder_with_config(ResolverConfig::default(), TokioRuntimeProvider::default()),
    };
    builder.options_mut().ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    builder.build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn numbers_and_names_of_the_hosts_file_need_no_server() {
        assert_eq!(resolve("10.0.0.2:7420").await.unwrap(), ["10.0.0.2:7420".parse().unwrap()]);
        assert_eq!(resolve("[fd00::2]:7420").await.unwrap(), ["[fd00::2]:7420".parse().unwrap()]);
        assert!(resolve("localhost:7420").await.unwrap().contains(&"127.0.0.1:7420".parse().unwrap()));
    }
}
