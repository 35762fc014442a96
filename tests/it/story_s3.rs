//! The ledger story with the repository in a bucket of a real S3 server: once with a target that reads the bucket
//! itself, and once with one that has no access of its own and goes through the source's agent. And on s3s-fs, as a server
//! that ignores conditions.

use super::story_postgres::{Home, tell};
use super::support::postgres::Version;
use super::support::two_hosts::Via;

#[test]
fn story_s3_postgres_15_with_a_target_that_reads_the_bucket_itself() {
    tell(Version::V15, Home::Bucket, Via::Directory);
}

#[test]
fn story_s3_postgres_18_with_a_target_that_reads_through_a_peer() {
    tell(Version::V18, Home::Bucket, Via::Peer);
}

#[test]
fn story_s3_postgres_15_on_a_server_in_this_process_that_ignores_conditions() {
    tell(Version::V15, Home::InProcess, Via::Directory);
}
