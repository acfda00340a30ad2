//! Typed access to pinned maps, single and in batches. The loader library has no batch operations, so this is
//! bpf(2) itself (linux/bpf.h; batches: kernel 5.6, for per-CPU arrays 5.13).

use std::{
    io,
    marker::PhantomData,
    mem::MaybeUninit,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya::{Pod, maps::MapData, util::nr_cpus};

use super::{MapError, shape};

/// `BPF_MAP_LOOKUP_ELEM`.
pub(super) const LOOKUP: libc::c_long = 1;
/// `BPF_MAP_UPDATE_ELEM`.
pub(super) const UPDATE: libc::c_long = 2;
/// `BPF_MAP_DELETE_ELEM`.
const DELETE: libc::c_long = 3;
/// `BPF_MAP_GET_NEXT_KEY`.
pub(super) const NEXT_KEY: libc::c_long = 4;
/// `BPF_OBJ_GET`.
const OBJECT_GET: libc::c_long = 7;
/// `BPF_MAP_LOOKUP_BATCH`.
const LOOKUP_BATCH: libc::c_long = 24;
/// `BPF_MAP_UPDATE_BATCH`.
const UPDATE_BATCH: libc::c_long = 26;
/// `BPF_PROG_TEST_RUN`.
const TEST_RUN: libc::c_long = 10;
/// Longest key of all maps, bytes: the size of a batch position.
const POSITION_BYTES: usize = 64;

/// `bpf_attr` of the operations on one element.
#[repr(C)]
pub(super) struct ElementAttr {
    pub(super) map_fd: u32,
    pub(super) _pad: u32,
    pub(super) key: u64,
    pub(super) value: u64,
    pub(super) flags: u64,
}

/// `bpf_attr` of the batch operations.
#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// The head of the `bpf_attr` for opening a pin.
#[repr(C)]
struct PinAttr {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// The head of the `bpf_attr` of a test run; the kernel takes the rest as zero.
#[repr(C)]
struct RunAttr {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
}

/// Opens a pinned program. The library would ask for it again by its id, which takes CAP_SYS_ADMIN.
pub fn open_program(pin: &Path) -> io::Result<OwnedFd> {
    let path = std::ffi::CString::new(pin.as_os_str().as_bytes())?;
    let mut attr = PinAttr {
        pathname: path.as_ptr() as u64,
        bpf_fd: 0,
        file_flags: 0,
    };
    // SAFETY: `pathname` is a string that lives through the call and ends in a zero byte.
    let fd = unsafe { bpf(OBJECT_GET, &mut attr) }?;
    // SAFETY: the kernel made the descriptor for this call, nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Runs an XDP program once on `packet` (64 bytes at least), which stays as it is; the program's return value.
pub fn run_program(program: BorrowedFd<'_>, packet: &[u8]) -> io::Result<u32> {
    let mut attr = RunAttr {
        prog_fd: program.as_raw_fd() as u32,
        retval: 0,
        data_size_in: packet.len() as u32,
        data_size_out: 0,
        data_in: packet.as_ptr() as u64,
        data_out: 0,
        repeat: 1,
        duration: 0,
    };
    // SAFETY: `data_in` is `data_size_in` readable bytes that live through the call; nothing else is an address.
    unsafe { bpf(TEST_RUN, &mut attr) }?;
    Ok(attr.retval)
}

/// bpf(2); what it returns is 0 or a new file descriptor.
///
/// # Safety
/// Every address in `attr` must be valid for what `command` reads and writes there.
pub(super) unsafe fn bpf<A>(command: libc::c_long, attr: &mut A) -> io::Result<i32> {
    // SAFETY: `attr` is a live, initialized prefix of `union bpf_attr` of the size given; the caller answers for the
    // addresses in it.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<A>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as i32)
    }
}

/// A pinned map with keys `K` and values `V`.
#[derive(Debug)]
pub struct Table<K, V> {
    map: MapData,
    name: &'static str,
    /// Entries it has room for.
    pub capacity: u32,
    types: PhantomData<fn(K) -> V>,
}

/// Where a walk through a map stands.
#[derive(Debug)]
pub struct Cursor {
    position: [u8; POSITION_BYTES],
    started: bool,
    done: bool,
    chunk: usize,
}

impl Cursor {
    /// At the start; `chunk` entries are wanted at a time.
    pub fn new(chunk: usize) -> Self {
        Self {
            position: [0; POSITION_BYTES],
            started: false,
            done: false,
            chunk: chunk.max(1),
        }
    }
}

impl<K: Pod, V: Pod> Table<K, V> {
    /// Opens the pin of `name` in `directory`. A map of other key or value sizes is refused (`EINVAL`).
    pub fn open(directory: &Path, name: &'static str) -> Result<Self, MapError> {
        let kernel = |source| MapError::Kernel {
            map: name,
            operation: "open",
            source,
        };
        let map = MapData::from_pin(directory.join(name)).map_err(|e| kernel(io::Error::other(e)))?;
        let info = map.info().map_err(|e| kernel(io::Error::other(e)))?;
        if info.key_size() as usize != size_of::<K>() || info.value_size() as usize != size_of::<V>() {
            return Err(kernel(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "keys of {} and values of {} bytes, {} and {} expected: run `weir detach`",
                    info.key_size(),
                    info.value_size(),
                    size_of::<K>(),
                    size_of::<V>()
                ),
            )));
        }
        Ok(Self {
            map,
            name,
            capacity: info.max_entries(),
            types: PhantomData,
        })
    }

    fn fd(&self) -> u32 {
        self.map.fd().as_fd().as_raw_fd() as u32
    }

    fn error(&self, operation: &'static str, source: io::Error) -> MapError {
        if source.raw_os_error() == Some(libc::E2BIG) || source.raw_os_error() == Some(libc::ENOSPC) {
            let setting = shape::find(self.name).map_or("services", |shape| shape.size.setting());
            return MapError::Full {
                map: self.name,
                capacity: self.capacity,
                setting,
            };
        }
        MapError::Kernel {
            map: self.name,
            operation,
            source,
        }
    }

    /// The value of `key`, if there is one.
    pub fn get(&self, key: &K) -> Result<Option<V>, MapError> {
        let mut value = MaybeUninit::<V>::uninit();
        let mut attr = ElementAttr {
            map_fd: self.fd(),
            _pad: 0,
            key: std::ptr::from_ref(key) as u64,
            value: value.as_mut_ptr() as u64,
            flags: 0,
        };
        // SAFETY: key and value have the sizes of the map (checked in `open`) and live through the call.
        match unsafe { bpf(LOOKUP, &mut attr) } {
            // SAFETY: the kernel filled all `value_size` bytes, and any bytes are a valid `Pod`.
            Ok(_) => Ok(Some(unsafe { value.assume_init() })),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(e) => Err(self.error("lookup", e)),
        }
    }

    /// Writes `key`, new or not.
    pub fn put(&self, key: &K, value: &V) -> Result<(), MapError> {
        let mut attr = ElementAttr {
            map_fd: self.fd(),
            _pad: 0,
            key: std::ptr::from_ref(key) as u64,
            value: std::ptr::from_ref(value) as u64,
            flags: 0,
        };
        // SAFETY: key and value have the sizes of the map (checked in `open`), live through the call and are only read.
        unsafe { bpf(UPDATE, &mut attr) }
            .map(drop)
            .map_err(|e| self.error("update", e))
    }

    /// Removes `key`; whether it was there.
    pub fn remove(&self, key: &K) -> Result<bool, MapError> {
        let mut attr = ElementAttr {
            map_fd: self.fd(),
            _pad: 0,
            key: std::ptr::from_ref(key) as u64,
            value: 0,
            flags: 0,
        };
        // SAFETY: the key has the size of the map's keys and lives through the call.
        match unsafe { bpf(DELETE, &mut attr) } {
            Ok(_) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(e) => Err(self.error("delete", e)),
        }
    }

    /// The next entries of a walk, appended to `keys` and `values`; false when the walk is over. Entries that
    /// change meanwhile may be missed or seen twice. For a full walk of an array use [`Table::range`].
    pub fn next_chunk(
        &self,
        cursor: &mut Cursor,
        keys: &mut Vec<K>,
        values: &mut Vec<V>,
    ) -> Result<bool, MapError> {
        const { assert!(size_of::<K>() <= POSITION_BYTES) };
        while !cursor.done {
            let mut out = [0_u8; POSITION_BYTES];
            keys.reserve(cursor.chunk);
            values.reserve(cursor.chunk);
            let mut attr = BatchAttr {
                in_batch: if cursor.started {
                    cursor.position.as_ptr() as u64
                } else {
                    0
                },
                out_batch: out.as_mut_ptr() as u64,
                keys: keys.spare_capacity_mut().as_mut_ptr() as u64,
                values: values.spare_capacity_mut().as_mut_ptr() as u64,
                count: cursor.chunk as u32,
                map_fd: self.fd(),
                elem_flags: 0,
                flags: 0,
            };
            // SAFETY: there is room for `chunk` keys and values of the map's sizes (just reserved) and for a position,
            // which is never longer than the longest key; all live through the call.
            let result = unsafe { bpf(LOOKUP_BATCH, &mut attr) };
            let error = result.err();
            match error.as_ref().and_then(io::Error::raw_os_error) {
                // One bucket holds more than a chunk: the kernel gave nothing and wants more room.
                Some(libc::ENOSPC) => {
                    cursor.chunk *= 2;
                    continue;
                }
                None | Some(libc::ENOENT) => {}
                Some(_) => {
                    return Err(self.error("batch lookup", error.unwrap_or_else(io::Error::last_os_error)));
                }
            }
            let filled = attr.count as usize;
            // SAFETY: the kernel wrote `count` (≤ chunk) keys and values into the spare room.
            unsafe {
                keys.set_len(keys.len() + filled);
                values.set_len(values.len() + filled);
            }
            cursor.position = out;
            cursor.started = true;
            cursor.done = error.is_some();
            return Ok(true);
        }
        Ok(false)
    }

    /// Everything in the map.
    pub fn all(&self) -> Result<Vec<(K, V)>, MapError> {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let mut cursor = Cursor::new(1024);
        while self.next_chunk(&mut cursor, &mut keys, &mut values)? {}
        Ok(keys.into_iter().zip(values).collect())
    }

    /// Everything in the map, one key after another: for map types without batches (prefix tries before 6.x).
    pub fn walk(&self) -> Result<Vec<(K, V)>, MapError> {
        let mut found = Vec::new();
        let mut last: Option<K> = None;
        loop {
            let mut next = MaybeUninit::<K>::uninit();
            let mut attr = ElementAttr {
                map_fd: self.fd(),
                _pad: 0,
                key: last.as_ref().map_or(0, |key| std::ptr::from_ref(key) as u64),
                value: next.as_mut_ptr() as u64,
                flags: 0,
            };
            // SAFETY: `last` is a key or null (the start), `next` has room for a key; both live through the call.
            match unsafe { bpf(NEXT_KEY, &mut attr) } {
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(found),
                Err(e) => return Err(self.error("walk", e)),
            }
            // SAFETY: the kernel filled the whole key, and any bytes are a valid `Pod`.
            let key = unsafe { next.assume_init() };
            if let Some(value) = self.get(&key)? {
                found.push((key, value));
            }
            last = Some(key);
        }
    }

    /// Writes many entries, those up to the first failure at least.
    pub fn put_all(&self, keys: &[K], values: &[V]) -> Result<(), MapError> {
        let count = keys.len().min(values.len());
        if count == 0 {
            return Ok(());
        }
        let mut attr = BatchAttr {
            in_batch: 0,
            out_batch: 0,
            keys: keys.as_ptr() as u64,
            values: values.as_ptr() as u64,
            count: count as u32,
            map_fd: self.fd(),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: `count` keys and values of the map's sizes, alive through the call and only read.
        unsafe { bpf(UPDATE_BATCH, &mut attr) }
            .map(drop)
            .map_err(|e| self.error("batch update", e))
    }
}

/// Reads `count` array values of `stride` bytes each from index `first` on, in as few calls as possible.
fn array_range(fd: u32, first: u32, count: u32, stride: usize) -> io::Result<Vec<u64>> {
    let words = stride / 8;
    let mut values = vec![0_u64; words * count as usize];
    let mut keys = vec![0_u32; count as usize];
    let mut done = 0_u32;
    while done < count {
        // The position of an array walk is the index of the last element seen.
        let before = (first + done).wrapping_sub(1);
        let mut out = 0_u32;
        let mut attr = BatchAttr {
            in_batch: if first + done == 0 {
                0
            } else {
                std::ptr::from_ref(&before) as u64
            },
            out_batch: std::ptr::from_mut(&mut out) as u64,
            keys: keys[done as usize..].as_mut_ptr() as u64,
            values: values[done as usize * words..].as_mut_ptr() as u64,
            count: count - done,
            map_fd: fd,
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: room for the remaining keys and values from `done` on, positions of one index each, all alive.
        match unsafe { bpf(LOOKUP_BATCH, &mut attr) } {
            Ok(_) => {}
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {
                done += attr.count;
                break;
            }
            Err(e) => return Err(e),
        }
        if attr.count == 0 {
            break;
        }
        done += attr.count;
    }
    values.truncate(words * done as usize);
    Ok(values)
}

impl<V: Pod> Table<u32, V> {
    /// The values of an array from index `first` on, `count` of them or as many as there are.
    pub fn range(&self, first: u32, count: u32) -> Result<Vec<V>, MapError> {
        let count = count.min(self.capacity.saturating_sub(first));
        let stride = size_of::<V>().next_multiple_of(8);
        if stride != size_of::<V>() {
            // The kernel packs batch values without gaps: only whole words can be read as words.
            return (first..first + count)
                .filter_map(|index| self.get(&index).transpose())
                .collect();
        }
        let words =
            array_range(self.fd(), first, count, stride).map_err(|e| self.error("batch lookup", e))?;
        Ok(words.chunks_exact(stride / 8).map(read_pod).collect())
    }
}

/// A value from the words the kernel wrote it to.
fn read_pod<V: Pod>(words: &[u64]) -> V {
    debug_assert!(size_of_val(words) >= size_of::<V>());
    // SAFETY: `words` has at least as many bytes as `V`, and any bytes are a valid `Pod`.
    unsafe { std::ptr::read_unaligned(words.as_ptr().cast()) }
}

/// A pinned per-CPU array.
#[derive(Debug)]
pub struct PerCpuTable<V> {
    inner: Table<u32, V>,
    cpus: usize,
}

impl<V: Pod> PerCpuTable<V> {
    /// Opens the pin of `name` in `directory`.
    pub fn open(directory: &Path, name: &'static str) -> Result<Self, MapError> {
        let inner = Table::open(directory, name)?;
        let cpus = nr_cpus().map_err(|(_, source)| MapError::Kernel {
            map: name,
            operation: "count CPUs",
            source,
        })?;
        Ok(Self { inner, cpus })
    }

    /// Entries it has room for.
    pub fn capacity(&self) -> u32 {
        self.inner.capacity
    }

    /// For each of `count` indexes from `first` on: the values of all possible CPUs.
    pub fn range(&self, first: u32, count: u32) -> Result<Vec<Vec<V>>, MapError> {
        let count = count.min(self.inner.capacity.saturating_sub(first));
        // Each CPU's value starts at a multiple of 8 bytes.
        let stride = size_of::<V>().next_multiple_of(8);
        let words = array_range(self.inner.fd(), first, count, stride * self.cpus)
            .map_err(|e| self.inner.error("batch lookup", e))?;
        Ok(words
            .chunks_exact(stride / 8 * self.cpus)
            .map(|entry| entry.chunks_exact(stride / 8).map(read_pod).collect())
            .collect())
    }
}
