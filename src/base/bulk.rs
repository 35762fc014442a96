//! Bulk work on plain threads: a few named threads move bytes with blocking calls, the runtime only waits for them.
//!
//! A dropped future does not stop its thread; work that must stop looks at a channel or a token of its own.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Context, Error, Kind, Result};

/// Runs `work` on a new thread called `name` (Linux shows its first 15 bytes) and waits for its result. A panic in it
/// becomes an error of kind `Internal`, so that it cannot take a whole agent with it.
pub async fn run_on_thread<T, F>(name: &str, work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name(name.to_string())
        .spawn(move || {
            // The closure is consumed and what it borrowed is gone with it, so nothing half-changed can be seen.
            let outcome = catch_unwind(AssertUnwindSafe(work));
            // A receiver that is gone was cancelled: nobody wants the result.
            let _ = sender.send(outcome);
        })
        .context(|| format!("cannot start thread '{name}'"))?;
    match receiver.await {
        Ok(Ok(result)) => result,
        Ok(Err(panic)) => Err(panic_error(name, panic.as_ref())),
        Err(_) => Err(Error::new(Kind::Internal, format!("thread '{name}' ended without a result"))),
    }
}

/// Runs a short blocking call on the runtime's pool of blocking threads; a panic becomes an error as above.
pub async fn run_blocking<T, F>(name: &str, work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => Err(panic_error(name, error.into_panic().as_ref())),
        Err(_) => Err(Error::new(Kind::Cancelled, format!("'{name}' was stopped because the process is ending"))),
    }
}

fn panic_error(name: &str, panic: &(dyn std::any::Any + Send)) -> Error {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    Error::new(Kind::Internal, format!("thread '{name}' panicked: {text}")).hint("this is a defect of keiki")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_on_a_bulk_thread_is_an_internal_error_with_its_text() {
        let error = run_on_thread("boom", || -> Result<()> { panic!("block {} is wrong", 7) }).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Internal);
        assert!(error.message().contains("block 7 is wrong"));
        let error = run_blocking("boom", || -> Result<()> { panic!("again") }).await.unwrap_err();
        assert!(error.message().contains("again"));
        assert_eq!(run_on_thread("fine", || Ok(3)).await.unwrap(), 3);
    }
}
