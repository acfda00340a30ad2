//! The agent's stream.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::{Buf as _, Bytes, BytesMut};
use http_body_util::{BodyExt as _, Empty};
use hyper::{Request, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use lb_route::{Message, SILENCE, State, WATCH_PATH};
use tokio::net::UnixStream;

/// First wait after a stream that failed; each next one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest wait.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error("nobody answers on {}: {source}; is the agent running, and is this user in the group weir-l7?", path.display())]
    Connect { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Http(#[from] hyper::Error),
    #[error("the agent answered {0}")]
    Refused(hyper::StatusCode),
    #[error("the agent said what is no message: {0}; is it of this version?")]
    Text(#[from] serde_json::Error),
    #[error("the agent has been silent for {SILENCE:?}")]
    Silence,
    #[error("the agent ended the stream")]
    End,
}

/// Follows the agent for ever. `publish` gets each state that differs from the one before.
///
/// What was published last stands while the agent is gone.
pub async fn follow(socket: &Path, mut publish: impl FnMut(&State)) {
    let mut pause = FIRST_PAUSE;
    loop {
        let mut heard = false;
        let error = match stream(socket, &mut publish, &mut heard).await {
            Err(error) => error,
            Ok(never) => match never {},
        };
        if heard {
            pause = FIRST_PAUSE;
        }
        tracing::warn!("{error}; serving on by what was heard last");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// One stream, until it fails.
async fn stream(
    socket: &Path,
    publish: &mut impl FnMut(&State),
    heard: &mut bool,
) -> Result<std::convert::Infallible, StreamError> {
    let connect = UnixStream::connect(socket).await;
    let io = connect.map_err(|source| StreamError::Connect {
        path: socket.into(),
        source,
    })?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(io)).await?;
    tokio::task::spawn_local(connection);
    let request = Request::get(WATCH_PATH)
        .header(header::HOST, "weir")
        .body(Empty::<Bytes>::new());
    let request = request.unwrap_or_else(|_| Request::new(Empty::new()));
    let answer = within(sender.send_request(request)).await??;
    if answer.status() != hyper::StatusCode::OK {
        return Err(StreamError::Refused(answer.status()));
    }
    tracing::info!(socket = %socket.display(), "listening to the agent");
    let mut body = answer.into_body();
    let (mut waiting, mut state) = (BytesMut::new(), None::<State>);
    loop {
        let frame = within(body.frame()).await?.ok_or(StreamError::End)??;
        let Some(data) = frame.data_ref() else { continue };
        let searched = waiting.len();
        waiting.extend_from_slice(data);
        let mut from = searched;
        while let Some(end) = waiting[from..]
            .iter()
            .position(|byte| *byte == b'\n')
            .map(|at| from + at)
        {
            let message: Message = serde_json::from_slice(&waiting[..end])?;
            waiting.advance(end + 1);
            from = 0;
            *heard = true;
            match (&mut state, message) {
                (_, Message::Alive) => {}
                (known, Message::Full(full)) => publish(known.insert(*full)),
                (Some(state), change) => {
                    state.apply(change);
                    publish(state);
                }
                // A change of nothing: the first message is everything.
                (None, Message::Change { .. }) => return Err(StreamError::End),
            }
        }
    }
}

async fn within<T>(work: impl Future<Output = T>) -> Result<T, StreamError> {
    tokio::time::timeout(SILENCE, work)
        .await
        .map_err(|_| StreamError::Silence)
}
