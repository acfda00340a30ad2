//! Options → lines of Weir's configuration.

mod engine;
mod proxy;

use std::{net::IpAddr, time::Duration};

use toml::Value;

use super::{
    Fate, Remark,
    options::{self, Here},
    read::{Extension, Source, Written, look},
    render::Lines,
};

/// Every option that is applied as a line; what becomes of each goes to the remarks.
pub(super) fn apply(source: &Source, node_addresses: &[IpAddr], remarks: &mut Vec<Remark>) -> Lines {
    let mut lines = Lines::default();
    lines.set("", "interfaces", Value::from(vec!["auto"]));
    let proxy = source.extensions.iter().find(|extension| is_proxy(extension));
    let told = proxy.and_then(|proxy| string(&proxy.options, "BackendOverrideAddress"));
    let overridden: Option<IpAddr> = told.and_then(|text| text.parse().ok());
    engine::docker(source, overridden, node_addresses, &mut lines, remarks);
    engine::metrics(source, &mut lines, remarks);
    for written in &source.top {
        if !remarks.iter().any(|remark| remark.option == written.name) {
            remark(remarks, written, None);
        }
    }
    for extension in &source.extensions {
        match proxy {
            Some(first) if std::ptr::eq(first, extension) => {
                proxy::first(extension, overridden, &mut lines, remarks)
            }
            _ => proxy::others(extension, proxy, remarks),
        }
    }
    if proxy.is_none() {
        look(
            remarks,
            "Extensions",
            "none of them is a proxy (haproxy, nginx), without which Interlock balances nothing: [l7] is left out",
        );
    }
    lines
}

fn is_proxy(extension: &Extension) -> bool {
    matches!(extension.name.as_str(), "haproxy" | "nginx")
}

fn get<'w>(options: &'w [Written], name: &str) -> Option<&'w Written> {
    options.iter().find(|written| written.option == name)
}

/// A text that says something.
fn string<'w>(options: &'w [Written], name: &str) -> Option<&'w str> {
    let text = get(options, name)?.value.as_str()?.trim();
    (!text.is_empty()).then_some(text)
}

/// A number that says something: 0 is what is not said.
fn number(options: &[Written], name: &str) -> Option<i64> {
    let value = &get(options, name)?.value;
    let number = value
        .as_integer()
        .or_else(|| value.as_str()?.trim().parse().ok())?;
    (number != 0).then_some(number)
}

/// Says what becomes of an option that is not applied.
fn remark(remarks: &mut Vec<Remark>, written: &Written, extension: Option<&str>) {
    let Some(option) = options::find(&written.name, extension.is_none()) else {
        return;
    };
    let is_read = extension.is_none_or(|extension| option.scope.is_read_by(extension));
    let says_something = match &written.value {
        Value::String(text) => !text.trim().is_empty(),
        Value::Integer(number) => *number != 0,
        Value::Boolean(flag) => *flag,
        _ => true,
    };
    // What was understood has been applied before.
    let fate = match option.here {
        Here::Key(key) if is_read && says_something => Fate::Look(format!(
            "`{}` is no value that Interlock reads: it is not applied; write {key} yourself",
            written.value
        )),
        _ => options::not_needed(option, extension),
    };
    remarks.push(Remark {
        option: written.name.clone(),
        fate,
    });
}

fn applied(remarks: &mut Vec<Remark>, written: &Written, to: String) {
    remarks.push(Remark {
        option: written.name.clone(),
        fate: Fate::Applied(to),
    });
}

/// A time as Weir's configuration has it.
fn shown(time: Duration) -> String {
    let ms = time.as_millis();
    match ms % 1000 {
        0 => format!("{}s", ms / 1000),
        _ => format!("{ms}ms"),
    }
}
