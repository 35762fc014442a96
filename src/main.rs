//! The `keiki` binary: everything is in the library.

/// glibc's allocator gives each thread an arena of its own and keeps what bulk threads free, which would make the
/// agent's memory grow with every backup.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    keiki::cli::run()
}
