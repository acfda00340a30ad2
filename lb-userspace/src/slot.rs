//! Room for one future, in a loop that waits for many things.

use futures_util::future::BoxFuture;

/// Waits for a future that may not be there (then for ever), and forgets it when it is done.
pub(crate) async fn ready<T>(slot: &mut Option<BoxFuture<'static, T>>) -> T {
    let Some(future) = slot else {
        return std::future::pending().await;
    };
    let answer = future.await;
    *slot = None;
    answer
}
