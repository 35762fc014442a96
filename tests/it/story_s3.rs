//! The ledger story with the repository in a bucket of a real S3 server: once with a target that reads the bucket
//! itself, and once with one that has no access of its own and goes through the source's agent.

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
