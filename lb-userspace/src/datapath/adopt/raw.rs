//! Pinned maps as bytes: what copies a map from one layout to the next without knowing its types.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
};

use aya::{
    maps::{MapData, MapInfo, MapType},
    util::nr_cpus,
};

use super::super::{
    MapError,
    batch::{ElementAttr, LOOKUP, NEXT_KEY, UPDATE, bpf},
};

/// A pinned map of whatever layout.
#[derive(Debug)]
pub struct RawMap {
    map: MapData,
    name: &'static str,
    /// Its type.
    pub kind: MapType,
    /// Bytes of a key.
    pub key: usize,
    /// Bytes of a value (of one CPU).
    pub value: usize,
    /// Entries it has room for.
    pub capacity: u32,
    /// How many values of how many bytes one look-up gives.
    cpus: usize,
}

impl RawMap {
    /// Opens the pin of `name` in `directory`.
    pub fn open(directory: &Path, name: &'static str) -> Result<Self, MapError> {
        let failed = |source| MapError::Kernel {
            map: name,
            operation: "open",
            source,
        };
        let map = MapData::from_pin(directory.join(name)).map_err(|e| failed(io::Error::other(e)))?;
        let info: MapInfo = map.info().map_err(|e| failed(io::Error::other(e)))?;
        let kind = info.map_type().map_err(|e| failed(io::Error::other(e)))?;
        let cpus = match kind {
            MapType::PerCpuArray => nr_cpus().map_err(|(_, source)| failed(source))?,
            _ => 1,
        };
        Ok(Self {
            kind,
            name,
            key: info.key_size() as usize,
            value: info.value_size() as usize,
            capacity: info.max_entries(),
            cpus,
            map,
        })
    }

    fn fd(&self) -> u32 {
        self.map.fd().as_fd().as_raw_fd() as u32
    }

    fn error(&self, operation: &'static str, source: io::Error) -> MapError {
        MapError::Kernel {
            map: self.name,
            operation,
            source,
        }
    }

    /// Whether keys are indexes.
    fn is_array(&self) -> bool {
        matches!(self.kind, MapType::Array | MapType::PerCpuArray)
    }

    /// Bytes from one CPU's value to the next.
    fn stride(&self) -> usize {
        if self.kind == MapType::PerCpuArray {
            self.value.next_multiple_of(8)
        } else {
            self.value
        }
    }

    /// The values of a key, one for each CPU.
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<Vec<u8>>>, MapError> {
        let mut values = vec![0_u8; self.stride() * self.cpus];
        let mut attr = ElementAttr {
            map_fd: self.fd(),
            _pad: 0,
            key: key.as_ptr() as u64,
            value: values.as_mut_ptr() as u64,
            flags: 0,
        };
        debug_assert_eq!(key.len(), self.key);
        // SAFETY: the key has as many bytes as the map's keys, and there is room for the values of all CPUs.
        match unsafe { bpf(LOOKUP, &mut attr) } {
            Ok(_) => Ok(Some(
                values
                    .chunks_exact(self.stride())
                    .map(|value| value[..self.value].to_vec())
                    .collect(),
            )),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(e) => Err(self.error("lookup", e)),
        }
    }

    /// Writes the values of a key, one for each CPU; what is missing at their ends is zero.
    pub fn put(&self, key: &[u8], values: &[Vec<u8>]) -> Result<(), MapError> {
        let mut all = vec![0_u8; self.stride() * self.cpus];
        for (to, from) in all.chunks_exact_mut(self.stride()).zip(values) {
            let length = from.len().min(self.value);
            to[..length].copy_from_slice(&from[..length]);
        }
        let mut attr = ElementAttr {
            map_fd: self.fd(),
            _pad: 0,
            key: key.as_ptr() as u64,
            value: all.as_ptr() as u64,
            flags: 0,
        };
        debug_assert_eq!(key.len(), self.key);
        // SAFETY: as in `get`; both are only read.
        unsafe { bpf(UPDATE, &mut attr) }
            .map(drop)
            .map_err(|e| self.error("update", e))
    }

    /// Calls `each` with every entry; of arrays only those that are not all zero.
    pub fn each(
        &self,
        mut each: impl FnMut(&[u8], Vec<Vec<u8>>) -> Result<(), MapError>,
    ) -> Result<(), MapError> {
        if self.is_array() {
            for index in 0..self.capacity {
                let key = index.to_ne_bytes();
                let values = self.get(&key)?.unwrap_or_default();
                if values.iter().flatten().any(|byte| *byte != 0) {
                    each(&key, values)?;
                }
            }
            return Ok(());
        }
        let mut last: Option<Vec<u8>> = None;
        // A key that goes meanwhile makes the kernel begin again: so often, no map has entries.
        for _ in 0..2 * u64::from(self.capacity) {
            let mut next = vec![0_u8; self.key];
            let mut attr = ElementAttr {
                map_fd: self.fd(),
                _pad: 0,
                key: last.as_ref().map_or(0, |key| key.as_ptr() as u64),
                value: next.as_mut_ptr() as u64,
                flags: 0,
            };
            // SAFETY: `last` is a key or null (the start), `next` has room for a key.
            match unsafe { bpf(NEXT_KEY, &mut attr) } {
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
                Err(e) => return Err(self.error("walk", e)),
            }
            if let Some(values) = self.get(&next)? {
                each(&next, values)?;
            }
            last = Some(next);
        }
        Ok(())
    }
}
