//! Pure parsers of PostgreSQL's files and of its write-ahead log.
