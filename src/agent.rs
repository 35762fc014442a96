//! The daemon: configuration, one supervisor per instance, and what answers requests.

pub mod config;
