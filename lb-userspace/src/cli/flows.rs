//! `weir flows`: live flows as a table.

use std::time::Duration;

use super::{
    FlowsArgs,
    humane::span,
    look, print, print_json,
    table::{Column, Look, Table},
};
use crate::admin::{
    api::{FlowList, FlowQuery},
    client::Client,
};

const FLOWS: &[Column] = &[
    Column::words("SERVICE").expendable(1),
    Column::words("CLIENT"),
    Column::words("VIP").expendable(3),
    Column::words("BACKEND"),
    Column::words("NAME").expendable(2),
    Column::words("STATE"),
    Column::numbers("AGE"),
    Column::numbers("IDLE"),
    Column::words("SNAT").expendable(4),
];

pub(super) async fn flows(client: &Client, args: &FlowsArgs) -> anyhow::Result<()> {
    let query = FlowQuery {
        service: args.service.clone(),
        client: args.client,
        backend: args.backend.clone(),
        limit: Some(args.limit),
    };
    let path = format!("/v1/flows?{}", serde_urlencoded::to_string(&query)?);
    let mut list: FlowList = client.get(&path).await?;
    if args.json {
        return print_json(&list);
    }
    list.flows
        .sort_by(|a, b| (&a.service, a.vip, a.client).cmp(&(&b.service, b.vip, b.client)));
    Ok(print(&render(&list, look()))?)
}

fn render(list: &FlowList, look: Look) -> String {
    if list.flows.is_empty() {
        return "no flows\n".into();
    }
    let mut table = Table::new(FLOWS, 0);
    table.head();
    let seconds = |s: u32| span(Duration::from_secs(s.into()));
    let or_id = |name: &str, id: u32| {
        if name.is_empty() {
            format!("#{id}")
        } else {
            name.to_owned()
        }
    };
    for flow in &list.flows {
        table.row(vec![
            or_id(&flow.service, flow.service_id).into(),
            flow.client.to_string().into(),
            format!("{}/{}", flow.vip, flow.protocol).into(),
            flow.backend.to_string().into(),
            or_id(&flow.backend_name, flow.backend_id).into(),
            flow.state.clone().into(),
            seconds(flow.age_s).into(),
            seconds(flow.idle_s).into(),
            flow.snat.map(|s| s.to_string()).unwrap_or_default().into(),
        ]);
    }
    if list.more {
        table.line(vec![
            format!("the first {} flows; more with --limit", list.flows.len()).into(),
        ]);
    }
    table.render(look)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{admin::api::FlowRow, model::Protocol};

    #[test]
    fn flows_are_a_table() {
        let row = FlowRow {
            protocol: Protocol::Tcp,
            client: "192.0.2.7:4000".parse().unwrap(),
            vip: "10.0.0.1:80".parse().unwrap(),
            backend: "172.17.0.2:8080".parse().unwrap(),
            snat: None,
            service_id: 1,
            backend_id: 11,
            service: "web".into(),
            backend_name: "web-1".into(),
            state: "established".into(),
            age_s: 65,
            idle_s: 1,
        };
        let gone = FlowRow {
            client: "192.0.2.70:4000".parse().unwrap(),
            backend_name: String::new(),
            state: "closing".into(),
            ..row.clone()
        };
        let list = FlowList {
            flows: vec![row, gone],
            more: true,
        };
        assert_eq!(
            render(&list, Look::default()),
            "SERVICE  CLIENT           VIP              BACKEND          NAME   STATE          AGE  IDLE\n\
             web      192.0.2.7:4000   10.0.0.1:80/tcp  172.17.0.2:8080  web-1  established  1m05s    1s\n\
             web      192.0.2.70:4000  10.0.0.1:80/tcp  172.17.0.2:8080  #11    closing      1m05s    1s\n\
             the first 2 flows; more with --limit\n"
        );
        assert_eq!(render(&FlowList::default(), Look::default()), "no flows\n");
    }
}
