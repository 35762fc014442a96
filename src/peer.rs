//! Agent to agent, and command line to agent: one closed set of requests over HTTP/1.1, on mutual TLS 1.3 between
//! hosts and on a Unix socket on the host.

pub mod access;
pub mod api;
mod body;
pub mod ca;
pub mod client;
pub mod server;
pub mod tls;
pub mod wire;
