//! One binary for all integration tests.

mod store_contract;
