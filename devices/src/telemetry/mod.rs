//! How a board is doing: temperatures, clocks, throttling and power, read from the kernel's files.

mod rails;
mod throttling;

use std::path::{Path, PathBuf};

use serde::Serialize;

pub use self::rails::Rail;
pub use self::throttling::{Throttling, ThrottlingCause};

/// What is known at one moment. A source that a machine does not have is named in [`absent`](Self::absent).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Telemetry {
    /// Thermal zones, in the kernel's order.
    pub temperatures: Vec<Temperature>,
    /// Groups of cores that share a clock.
    pub clocks: Vec<Clock>,
    /// What the firmware of a Raspberry Pi tells of throttling.
    pub throttling: Option<Throttling>,
    /// Power rails.
    pub rails: Vec<Rail>,
    /// Sources that are not there, in words.
    pub absent: Vec<&'static str>,
}

/// A thermal zone.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Temperature {
    /// The kernel's name for what is measured, such as `cpu-thermal`.
    pub zone: String,
    /// In °C.
    pub temperature_c: f64,
}

/// The clock of a group of cores.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Clock {
    /// The group, such as `policy0`.
    pub policy: String,
    /// Cores in it, as the kernel lists them: `0 1 2 3`.
    pub cores: String,
    /// What it runs at now, in MHz.
    pub current_mhz: u32,
    /// The range that it may run at, in MHz.
    pub lowest_mhz: Option<u32>,
    /// The upper end of that range.
    pub highest_mhz: Option<u32>,
    /// Who sets it, such as `ondemand` or `performance`.
    pub governor: Option<String>,
}

impl Telemetry {
    /// Reads what there is under `root`, `/` of the machine.
    #[must_use]
    pub fn read(root: &Path) -> Self {
        let mut telemetry = Self {
            temperatures: temperatures(root),
            clocks: clocks(root),
            throttling: throttling::read(root),
            rails: rails::read(root),
            absent: Vec::new(),
        };
        let sources = [
            (telemetry.temperatures.is_empty(), "temperatures (no readable zone in /sys/class/thermal)"),
            (telemetry.clocks.is_empty(), "clocks (no /sys/devices/system/cpu/cpufreq)"),
            (telemetry.throttling.is_none(), "throttling (no get_throttled of a Raspberry Pi's firmware)"),
            (telemetry.rails.is_empty(), "power rails (no INA3221 monitor)"),
        ];
        telemetry.absent = sources.into_iter().filter(|(absent, _)| *absent).map(|(_, name)| name).collect();
        telemetry
    }

    /// The hottest of the named zones, in °C; of all where none of them is there.
    #[must_use]
    pub fn hottest_c(&self, zones: &[String]) -> Option<f64> {
        let named = self.temperatures.iter().filter(|temperature| zones.contains(&temperature.zone));
        hottest_of(named).or_else(|| hottest_of(self.temperatures.iter()))
    }

    /// Power of the named rails together, in mW; `None` where any of them is not there.
    #[must_use]
    pub fn power_mw(&self, rails: &[String]) -> Option<f64> {
        let power = |name: &String| self.rails.iter().find(|rail| rail.name == *name).map(|rail| rail.power_mw);
        if rails.is_empty() { None } else { rails.iter().map(power).sum() }
    }
}

fn hottest_of<'a>(zones: impl Iterator<Item = &'a Temperature>) -> Option<f64> {
    zones.map(|zone| zone.temperature_c).reduce(f64::max)
}

fn temperatures(root: &Path) -> Vec<Temperature> {
    let zones = entries(&root.join("sys/class/thermal"), "thermal_zone").into_iter().filter_map(|zone| {
        // A zone may be there and not give a value, as those of parts that are switched off.
        let millidegrees = number(&zone.join("temp"))?;
        let name = text(&zone.join("type")).or_else(|| Some(zone.file_name()?.to_string_lossy().into_owned()))?;
        Some(Temperature { zone: name, temperature_c: millidegrees as f64 / 1000.0 })
    });
    zones.collect()
}

fn clocks(root: &Path) -> Vec<Clock> {
    let policies = entries(&root.join("sys/devices/system/cpu/cpufreq"), "policy").into_iter().filter_map(|policy| {
        let mhz = |file: &str| number(&policy.join(file)).and_then(|khz| u32::try_from(khz / 1000).ok());
        Some(Clock {
            policy: policy.file_name()?.to_string_lossy().into_owned(),
            cores: text(&policy.join("affected_cpus")).unwrap_or_default(),
            // What the hardware tells, where anybody may read it, else what the kernel asked of it.
            current_mhz: mhz("cpuinfo_cur_freq").or_else(|| mhz("scaling_cur_freq"))?,
            lowest_mhz: mhz("scaling_min_freq"),
            highest_mhz: mhz("scaling_max_freq"),
            governor: text(&policy.join("scaling_governor")),
        })
    });
    policies.collect()
}

/// Entries of a folder whose names begin so, in the order of the numbers they end in.
fn entries(folder: &Path, beginning: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut found: Vec<(u64, PathBuf)> = entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let rest = path.file_name()?.to_str()?.strip_prefix(beginning)?;
            Some((rest.parse().unwrap_or(u64::MAX), path))
        })
        .collect();
    found.sort();
    found.into_iter().map(|(_, path)| path).collect()
}

/// A file's text, without the line's end; `None` where there is nothing to read.
fn text(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?.trim().to_owned();
    (!text.is_empty()).then_some(text)
}

fn number(path: &Path) -> Option<i64> {
    text(path)?.parse().ok()
}

#[cfg(test)]
mod tests;
