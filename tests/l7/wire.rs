//! A client that sends what it is told, byte by byte, and understands just enough of the answers.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
};

use super::shim::PATIENCE;

/// A connection.
pub struct Wire {
    stream: BufReader<TcpStream>,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub trailers: Vec<(String, String)>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Wire {
    pub fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self {
            stream: BufReader::new(stream),
        }
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.get_mut().write_all(bytes.as_ref()).unwrap();
    }

    /// Sends what the other end may no longer want.
    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> std::io::Result<()> {
        self.stream.get_mut().write_all(bytes.as_ref())
    }

    pub fn raw(&self) -> &TcpStream {
        self.stream.get_ref()
    }

    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub fn read(&mut self, bytes: usize) -> Vec<u8> {
        let mut buf = vec![0; bytes];
        self.stream.read_exact(&mut buf).unwrap();
        buf
    }

    /// Whether the other end has closed, or reset, the connection; waits for it. Panics on bytes.
    pub fn is_closed(&mut self) -> bool {
        match self.stream.fill_buf() {
            Ok([]) => true,
            Ok(bytes) => panic!("bytes instead of the end: {:?}", String::from_utf8_lossy(bytes)),
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    fn headers(&mut self) -> Vec<(String, String)> {
        let mut headers = Vec::new();
        loop {
            let line = self.line();
            let Some((name, value)) = line.split_once(':') else {
                assert!(line.is_empty(), "{line}");
                return headers;
            };
            headers.push((name.to_lowercase(), value.trim().to_owned()));
        }
    }

    /// The next answer to a request with this method.
    pub fn answer_to(&mut self, method: &str) -> Answer {
        let first = self.line();
        let status = first
            .split(' ')
            .nth(1)
            .unwrap_or_else(|| panic!("no status line: {first:?}"));
        let mut answer = Answer {
            status: status.parse().unwrap(),
            headers: self.headers(),
            body: Vec::new(),
            trailers: Vec::new(),
        };
        if method == "HEAD" || matches!(answer.status, 100..=199 | 204 | 304) {
            return answer;
        }
        if let Some(length) = answer.header("content-length") {
            let length = length.parse().unwrap();
            answer.body = self.read(length);
        } else if answer.header("transfer-encoding") == Some("chunked") {
            loop {
                let size = usize::from_str_radix(&self.line(), 16).unwrap();
                if size == 0 {
                    break;
                }
                answer.body.extend(self.read(size));
                assert_eq!(self.line(), "");
            }
            answer.trailers = self.headers();
        } else {
            self.stream.read_to_end(&mut answer.body).unwrap();
        }
        answer
    }

    pub fn answer(&mut self) -> Answer {
        self.answer_to("GET")
    }

    /// `GET /` on a connection that may have been cut off: the status of the answer, if there is one.
    pub fn try_get(&mut self, host: &str) -> Option<u16> {
        self.try_send(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"))
            .ok()?;
        let mut line = String::new();
        self.stream.read_line(&mut line).ok()?;
        line.split(' ').nth(1)?.parse().ok()
    }

    /// `GET` on this connection.
    pub fn get(&mut self, host: &str, path: &str) -> Answer {
        self.send(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        self.answer()
    }
}

/// `GET` on a connection of its own.
pub fn get(address: SocketAddr, host: &str, path: &str) -> Answer {
    Wire::connect(address).get(host, path)
}
