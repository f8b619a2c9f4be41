//! `muster approve` and `muster disapprove`.

use muster_proto::admin::Device;

use super::{Context, apply::ATTEMPTS};
use crate::{
    approval::{self, Carried},
    args::{Approve, Selection},
    client::{Client, Failure},
    error::{Error, Result},
    output::print_change,
    resource::{Key, Kind},
    target,
};

pub(super) async fn run(ctx: &mut Context<'_>, args: Approve, approve: bool) -> Result {
    let verb = if approve { "approve" } else { "disapprove" };
    let targets = target::parse(&args.targets).map_err(Error::Usage)?;
    for target in &targets {
        let plural = target.kind.names().plural;
        if target.kind != Kind::Device {
            return Err(Error::Usage(format!("{plural} carry no hosts or subnets; {verb} devices")));
        }
        if target.names.is_empty() {
            return Err(Error::Usage(format!("say which devices: muster {verb} device NAME")));
        }
    }
    let named = Carried::new(args.hosts, &args.subnets);
    let wanted = (!args.all).then_some(&named);
    let client = ctx.client().await?;
    let mut untold = Vec::new();
    for target in &targets {
        for device in ctx.select::<Device>(target, &Selection::default()).await?.objects {
            if wanted.is_some_and(Carried::is_empty) {
                untold.push(device);
                continue;
            }
            match Box::pin(one(&client, device, wanted, approve)).await {
                Ok((device, changed)) => {
                    let done = match changed.is_empty() {
                        true => "unchanged".to_owned(),
                        false => format!("{verb}d: {changed}"),
                    };
                    print_change(ctx.out, args.printing.output, &device, &done)?;
                    let warning = approve.then(|| approval::warning(&device, wanted?));
                    if let Some(warning) = warning.flatten() {
                        writeln!(ctx.err, "muster: warning: {warning}")?;
                    }
                }
                Err(error) => ctx.fail(&error),
            }
        }
    }
    if untold.is_empty() {
        return Ok(());
    }
    let choices = untold.iter().map(if approve { approval::to_approve } else { approval::to_disapprove });
    let choices: String = choices.map(|choice| format!("\n  {choice}")).collect();
    Err(Error::Usage(format!("say what to {verb}: --hosts, --subnet CIDR, or --all{choices}")))
}

/// Changes one device, again if another changed it meanwhile; returns it and what has changed.
async fn one(
    client: &Client,
    mut device: Device,
    wanted: Option<&Carried>,
    approve: bool,
) -> Result<(Device, Carried)> {
    let change = if approve { approval::approve } else { approval::disapprove };
    let mut attempts = ATTEMPTS;
    loop {
        attempts -= 1;
        let changed = change(&mut device, wanted).map_err(Error::Approval)?;
        if changed.is_empty() {
            return Ok((device, changed));
        }
        // The list of subnets is written as a whole: only as it was read.
        match client.update(device.clone(), changed.mask()).await {
            Ok(device) => return Ok((device, changed)),
            Err(error) if error.failure == Failure::Conflict && attempts > 0 => {
                device = client.get(&Key::of(&device)).await?;
            }
            Err(error) => return Err(error.into()),
        }
    }
}
