//! Power rails of a Jetson: INA3221 monitors, each of up to three channels.

use std::path::Path;

use serde::Serialize;

use super::{entries, number, text};

/// A power rail.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rail {
    /// Its name on the board's circuit diagram, such as `VDD_IN`.
    pub name: String,
    /// In mV.
    pub voltage_mv: i64,
    /// In mA.
    pub current_ma: i64,
    /// In mW.
    pub power_mw: f64,
}

/// Reads the monitors in either form: that of Linux's own driver (Jetson Linux 34 and later, `Documentation/hwmon/ina3221.rst`),
/// and that of NVIDIA's older one (`ina3221x`).
pub(super) fn read(root: &Path) -> Vec<Rail> {
    let hwmon = entries(&root.join("sys/class/hwmon"), "hwmon").into_iter();
    let own = hwmon.filter(|monitor| text(&monitor.join("name")).as_deref() == Some("ina3221"));
    let mut rails: Vec<Rail> = own.flat_map(|monitor| (1..=3).filter_map(move |channel| channel_of(&monitor, channel))).collect();
    let older = entries(&root.join("sys/bus/i2c/drivers/ina3221x"), "");
    let devices = older.into_iter().flat_map(|monitor| entries(&monitor, "iio:device"));
    rails.extend(devices.flat_map(|device| (0..3).filter_map(move |channel| older_channel_of(&device, channel))));
    rails
}

fn channel_of(monitor: &Path, channel: u32) -> Option<Rail> {
    let value = |name: String| number(&monitor.join(name));
    // A channel that nothing hangs on has no name, or is called so.
    let name = text(&monitor.join(format!("in{channel}_label"))).filter(|name| name != "NC")?;
    let (voltage_mv, current_ma) = (value(format!("in{channel}_input"))?, value(format!("curr{channel}_input"))?);
    Some(Rail { name, voltage_mv, current_ma, power_mw: (voltage_mv * current_ma) as f64 / 1000.0 })
}

fn older_channel_of(device: &Path, channel: u32) -> Option<Rail> {
    let value = |what: &str| number(&device.join(format!("in_{what}{channel}_input")));
    let name = text(&device.join(format!("rail_name_{channel}"))).filter(|name| name != "NC")?;
    let (voltage_mv, current_ma) = (value("voltage")?, value("current")?);
    Some(Rail { name, voltage_mv, current_ma, power_mw: value("power")? as f64 })
}
