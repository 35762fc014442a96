//! Files of MariaDB and MySQL as bytes: pure parsers without a server behind them.
//!
//! Bytes are foreign: nothing here panics on any of them, and nothing is allocated because a length says so.

pub mod aria_control;
pub mod auto_cnf;
pub mod backup_info;
pub mod binlog;
mod bytes;
pub mod gtid;
pub mod gtid_event;
pub mod gtid_set;
pub mod mbstream;
pub mod transaction;
pub mod walker;
