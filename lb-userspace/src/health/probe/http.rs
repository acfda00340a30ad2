//! The request of `http` and `https`.

use std::net::SocketAddr;

use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request, Response,
    body::{Bytes, Incoming},
    client::conn::http1,
    header,
};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::Fault;
use crate::model::HttpCheck;

/// Bytes of a body that are looked through.
const BODY: usize = 64 << 10;

/// One request over a fresh connection; what was answered, or why that is not good.
pub(super) async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    to: SocketAddr,
    check: &HttpCheck,
) -> Result<String, Fault> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::builder()
        .method(check.method.name())
        .uri(&check.path)
        .header(header::HOST, check.host.clone().unwrap_or_else(|| to.to_string()))
        .header(
            header::USER_AGENT,
            concat!("weir/", env!("CARGO_PKG_VERSION"), " (health check)"),
        )
        .header(header::ACCEPT, "*/*")
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())?;
    // The connection may end before the answer has been looked through; what it said stands.
    let drive = async {
        let _its_fault_is_the_exchange_s = connection.await;
        std::future::pending::<std::convert::Infallible>().await
    };
    tokio::select! {
        biased;
        result = async { judge(sender.send_request(request).await?, check).await } => result,
        never = drive => match never {},
    }
}

async fn judge(answer: Response<Incoming>, check: &HttpCheck) -> Result<String, Fault> {
    let status = answer.status();
    let code = status.as_u16();
    if !check
        .status
        .iter()
        .any(|(first, last)| (*first..=*last).contains(&code))
    {
        return Err(Fault::Status(status));
    }
    if let Some(text) = &check.body
        && !contains(answer.into_body(), text.as_bytes()).await?
    {
        return Err(Fault::Body {
            status,
            text: text.clone(),
        });
    }
    Ok(status.to_string())
}

/// Whether the text is among the first bytes of the body.
async fn contains(mut body: Incoming, text: &[u8]) -> Result<bool, Fault> {
    let mut read = Vec::new();
    while read.len() < BODY {
        let Some(frame) = body.frame().await else { break };
        if let Ok(data) = frame?.into_data() {
            // Only what is new can complete a match.
            let from = read.len().saturating_sub(text.len());
            read.extend_from_slice(&data[..data.len().min(BODY - read.len())]);
            if read[from..]
                .windows(text.len().max(1))
                .any(|window| window == text)
            {
                return Ok(true);
            }
        }
    }
    Ok(text.is_empty())
}
