//! The command line's end of the Unix socket.

use std::{
    io,
    path::{Path, PathBuf},
};

use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, StatusCode,
    body::{Bytes, Incoming},
    header,
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use super::api::Refusal;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "the agent is not running: nobody answers on {}; start it with `systemctl start weir` or `weir run --config /etc/weir/weir.toml`, or name its socket with --socket",
        .0.display()
    )]
    NotRunning(PathBuf),
    /// The socket is not for this user.
    #[error("no permission to use {}: run this as root, or become a member of the socket's group", .0.display())]
    Permission(PathBuf),
    /// The agent said no.
    #[error("{}", refusal_text(.0))]
    Refused(Refusal),
    /// Neither side understood the other.
    #[error("the agent on {} gave no proper answer: {source}; is it of this version of weir?", socket.display())]
    Protocol {
        /// The socket.
        socket: PathBuf,
        /// What went wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A caller of the agent's API. Every call is a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// For the agent that listens on `socket`.
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// `GET`, and its answer.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.whole(Method::GET, path, Vec::new()).await
    }

    /// `POST` of a value, and its answer.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|e| self.protocol(e))?;
        self.whole(Method::POST, path, body).await
    }

    /// `GET` of an endless answer; hands over each line until the agent ends it or `each` returns false.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn follow<T: DeserializeOwned>(
        &self,
        path: &str,
        mut each: impl FnMut(T) -> bool,
    ) -> Result<(), ClientError> {
        let mut body = self.send(Method::GET, path, Vec::new()).await?;
        let mut waiting = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|e| self.protocol(e))?;
            waiting.extend_from_slice(frame.data_ref().map_or(&[], |data| &data[..]));
            while let Some(end) = waiting.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = waiting.drain(..=end).collect();
                if !each(serde_json::from_slice(&line).map_err(|e| self.protocol(e))?) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    async fn whole<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<T, ClientError> {
        let answer = self.send(method, path, body).await?;
        let bytes = answer.collect().await.map_err(|e| self.protocol(e))?.to_bytes();
        serde_json::from_slice(&bytes).map_err(|e| self.protocol(e))
    }

    /// Sends a request; the body of the answer if it is a success.
    async fn send(&self, method: Method, path: &str, body: Vec<u8>) -> Result<Incoming, ClientError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|e| self.connect(e))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| self.protocol(e))?;
        // Ends when the answer has been read or dropped.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "weir")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| self.protocol(e))?;
        let answer = sender.send_request(request).await.map_err(|e| self.protocol(e))?;
        if answer.status() == StatusCode::OK {
            return Ok(answer.into_body());
        }
        let status = answer.status();
        let bytes = answer
            .into_body()
            .collect()
            .await
            .map_err(|e| self.protocol(e))?
            .to_bytes();
        Err(serde_json::from_slice(&bytes).map_or_else(
            |_| self.protocol(format!("HTTP status {status} on {path}")),
            ClientError::Refused,
        ))
    }

    fn connect(&self, error: io::Error) -> ClientError {
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::NotRunning(self.socket.clone())
            }
            io::ErrorKind::PermissionDenied => ClientError::Permission(self.socket.clone()),
            _ => self.protocol(error),
        }
    }

    fn protocol(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
        ClientError::Protocol {
            socket: self.socket.clone(),
            source: source.into(),
        }
    }
}

/// A refusal with its remedy and what could have been meant.
fn refusal_text(refusal: &Refusal) -> String {
    let mut text = refusal.error.clone();
    if !refusal.remedy.is_empty() {
        text = format!("{text}; {}", refusal.remedy);
    }
    for candidate in &refusal.candidates {
        text.push_str(&format!(
            "\n  {}  {}/{}  {}",
            candidate.id.map_or_else(|| "route".into(), |id| format!("#{id}")),
            candidate.service,
            candidate.name,
            candidate.address
        ));
    }
    text
}
