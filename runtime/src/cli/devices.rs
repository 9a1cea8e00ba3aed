//! `unimo devices`: the boards that are known, and which one this is.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde::Serialize;
use unimo_devices::board::{self, Board, Detected, Evidence, Machine};
use unimo_devices::telemetry::{Telemetry, ThrottlingCause};

use super::exit::{NOTHING_FOUND, UsageError};
use super::output::{Output, SCHEMA};

const EXAMPLES: &str = "\
Examples:
  unimo devices list
  unimo devices show raspberry-pi-5
  unimo devices detect --json
";

/// List the boards that are known, and tell which one this is and how it is doing
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct DevicesArgs {
    #[command(subcommand)]
    command: DevicesCommand,
}

#[derive(Debug, Subcommand)]
enum DevicesCommand {
    /// List the boards that are known
    List {
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
    /// Show what is known of a board, and how the runtime is best set up on it
    Show {
        /// Its name in the list
        name: String,
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
    /// Tell which board this is, its temperatures, clocks, throttling and power
    Detect {
        /// Folder that holds the machine's /proc, /sys and /etc, as copied from another one
        #[arg(long, value_name = "FOLDER", default_value = "/")]
        root: PathBuf,
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
}

/// The document of `devices detect`.
#[derive(Debug, Serialize)]
struct DetectReport<'a> {
    schema: u32,
    board: Option<&'a str>,
    title: Option<&'a str>,
    known_by: Option<&'a Evidence>,
    machine: &'a Machine,
    telemetry: &'a Telemetry,
    /// Of the zones that the board names.
    hottest_c: Option<f64>,
    /// Of the whole module.
    power_mw: Option<f64>,
}

pub fn run(args: &DevicesArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        DevicesCommand::List { json } => list(*json),
        DevicesCommand::Show { name, json } => show(name, *json),
        DevicesCommand::Detect { root, json } => detect(root, *json),
    }
}

fn list(json: bool) -> anyhow::Result<ExitCode> {
    let boards = board::all()?;
    let output = Output::new(0);
    if json {
        output.json(&serde_json::json!({ "schema": SCHEMA, "boards": boards }))?;
    } else {
        let width = boards.iter().map(|board| board.name.len()).max().unwrap_or_default();
        boards.iter().try_for_each(|board| output.line(&format!("{:width$}  {}", board.name, board.title)))?;
    }
    Ok(output.finish())
}

fn show(name: &str, json: bool) -> anyhow::Result<ExitCode> {
    let boards = board::all()?;
    let Some(board) = boards.iter().find(|board| board.name == name) else {
        let names: Vec<&str> = boards.iter().map(|board| board.name.as_str()).collect();
        return Err(UsageError(format!("there is no board {name}; there are {}", names.join(", "))).into());
    };
    let output = Output::new(0);
    if json {
        output.json(&serde_json::json!({ "schema": SCHEMA, "board": board }))?;
    } else {
        lines_of_board(board).iter().try_for_each(|line| output.line(line))?;
    }
    Ok(output.finish())
}

fn lines_of_board(board: &Board) -> Vec<String> {
    let Board { processor, run, camera, telemetry, .. } = board;
    let mut lines = vec![board.title.clone()];
    let mut line = |name: &str, value: String| lines.push(format!("{name:<10} {value}"));
    line("targets", board.triples.join(", "));
    if let (Some(cores), Some(count), Some(mhz)) = (&processor.cores, processor.count, processor.highest_mhz) {
        line("processor", format!("{count} x {cores}, {mhz} MHz, {}", processor.features.join(" ")));
    }
    if let Some(gpu) = &processor.gpu {
        line("gpu", gpu.clone());
    }
    if !processor.memory_mib.is_empty() {
        let sizes: Vec<String> = processor.memory_mib.iter().map(ToString::to_string).collect();
        line("memory", format!("{} MiB", sizes.join(", ")));
    }
    let engines: Vec<String> = run.engines.iter().map(|engine| format!("{} on {}", engine.engine, engine.provider)).collect();
    line("engines", engines.join(", then "));
    line("precision", run.precision.clone());
    line("threads", run.threads.map_or("all".to_owned(), |threads| threads.to_string()));
    let fps = camera.fps.map(|fps| format!(", {fps}/s")).unwrap_or_default();
    line("camera", format!("{}, {}x{}{fps}", camera.uri, camera.size.0, camera.size.1));
    if let Some(display) = &board.display {
        line("display", display.uri.clone());
    }
    if !telemetry.thermal_zones.is_empty() {
        line("thermal", telemetry.thermal_zones.join(", "));
    }
    if !telemetry.total_rails.is_empty() {
        line("power", telemetry.total_rails.join(" + "));
    }
    if let Some(budget) = &board.budget {
        let target = format!("{} ms a caption, {} MiB, {} °C", budget.caption_ms, budget.memory_mib, budget.temperature_c);
        line("aimed at", format!("{target} (targets, not measurements)"));
    }
    lines
}

/// Which board the files under `root` belong to, and how it is doing. Its architecture is this program's.
pub fn look(root: &Path) -> anyhow::Result<(Detected, Telemetry)> {
    Ok((board::detect(root, std::env::consts::ARCH)?, Telemetry::read(root)))
}

fn detect(root: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let (Detected { board, machine }, telemetry) = look(root)?;
    let sources = board.as_ref().map(|(board, _)| &board.telemetry);
    let hottest_c = telemetry.hottest_c(sources.map_or(&[], |sources| sources.thermal_zones.as_slice()));
    let power_mw = telemetry.power_mw(sources.map_or(&[], |sources| sources.total_rails.as_slice()));
    let output = Output::new(0);
    if json {
        output.json(&DetectReport {
            schema: SCHEMA,
            board: board.as_ref().map(|(board, _)| board.name.as_str()),
            title: board.as_ref().map(|(board, _)| board.title.as_str()),
            known_by: board.as_ref().map(|(_, evidence)| evidence),
            machine: &machine,
            telemetry: &telemetry,
            hottest_c,
            power_mw,
        })?;
    } else {
        let mut lines = vec![match &board {
            Some((board, evidence)) => format!("board      {} ({}), known by {evidence}", board.title, board.name),
            None => "board      none that is known".to_owned(),
        }];
        lines.extend(lines_of_machine(&machine));
        lines.extend(lines_of_telemetry(&telemetry, power_mw));
        lines.iter().try_for_each(|line| output.line(line))?;
    }
    if board.is_none() {
        return Ok(ExitCode::from(NOTHING_FOUND));
    }
    Ok(output.finish())
}

fn lines_of_machine(machine: &Machine) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = |name: &str, value: Option<String>| lines.extend(value.map(|value| format!("{name:<10} {value}")));
    line("model", machine.model.clone());
    line("system", machine.jetson_linux.as_ref().map(|version| format!("Jetson Linux {version}")));
    line("cores", machine.cores.map(|cores| cores.to_string()));
    line("memory", machine.memory_mib.map(|mib| format!("{mib} MiB")));
    lines
}

fn lines_of_telemetry(telemetry: &Telemetry, power_mw: Option<f64>) -> Vec<String> {
    let mut lines = Vec::new();
    for zone in &telemetry.temperatures {
        lines.push(format!("heat       {}: {:.1} °C", zone.zone, zone.temperature_c));
    }
    for clock in &telemetry.clocks {
        let range = match (clock.lowest_mhz, clock.highest_mhz) {
            (Some(lowest), Some(highest)) => format!(" of {lowest} to {highest}"),
            _ => String::new(),
        };
        let governor = clock.governor.as_ref().map(|governor| format!(", governor {governor}")).unwrap_or_default();
        lines.push(format!("clock      cores {}: {} MHz{range}{governor}", clock.cores, clock.current_mhz));
    }
    if let Some(throttling) = telemetry.throttling {
        lines.push(format!(
            "throttling now: {}; since the start: {}",
            causes(&throttling.now()),
            causes(&throttling.since_start())
        ));
    }
    for rail in &telemetry.rails {
        let (voltage, current) = (rail.voltage_mv, rail.current_ma);
        lines.push(format!("power      {}: {:.0} mW ({voltage} mV, {current} mA)", rail.name, rail.power_mw));
    }
    lines.extend(power_mw.map(|power| format!("power      the whole module: {power:.0} mW")));
    lines.extend(telemetry.absent.iter().map(|source| format!("absent     {source}")));
    lines
}

fn causes(causes: &[ThrottlingCause]) -> String {
    if causes.is_empty() {
        return "none".to_owned();
    }
    causes.iter().map(|cause| cause.words()).collect::<Vec<_>>().join(", ")
}

/// The board in one line, for `doctor`.
pub fn one_line(root: &Path) -> anyhow::Result<String> {
    let (Detected { board, .. }, telemetry) = look(root)?;
    let Some((board, _)) = board else { return Ok("none that is known".to_owned()) };
    let heat = telemetry.hottest_c(&board.telemetry.thermal_zones).map(|hottest| format!(", {hottest:.1} °C"));
    let held_back = telemetry.throttling.map(|throttling| throttling.now()).filter(|now| !now.is_empty());
    let held_back = held_back.map(|now| format!(", HELD BACK: {}", causes(&now)));
    Ok(format!("{}{}{}", board.title, heat.unwrap_or_default(), held_back.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, contents) in files {
            let file = folder.path().join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, contents).unwrap();
        }
        folder
    }

    #[test]
    fn a_jetson_in_lines() {
        let (monitor, policy) = ("sys/class/hwmon/hwmon1", "sys/devices/system/cpu/cpufreq/policy0");
        let jetson = tree(&[
            ("proc/device-tree/model", "NVIDIA Jetson Orin Nano Developer Kit\0"),
            ("proc/cpuinfo", "processor\t: 0\n\nprocessor\t: 1\n"),
            ("proc/meminfo", "MemTotal: 7802880 kB\n"),
            ("etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 38968081\n"),
            (&format!("{monitor}/name"), "ina3221\n"),
            (&format!("{monitor}/in1_label"), "VDD_IN\n"),
            (&format!("{monitor}/in1_input"), "5072\n"),
            (&format!("{monitor}/curr1_input"), "1008\n"),
            (&format!("{policy}/affected_cpus"), "0 1\n"),
            (&format!("{policy}/scaling_cur_freq"), "729600\n"),
            (&format!("{policy}/scaling_min_freq"), "115200\n"),
            (&format!("{policy}/scaling_max_freq"), "1510400\n"),
            (&format!("{policy}/scaling_governor"), "schedutil\n"),
        ]);
        let (Detected { board, machine }, telemetry) = look(jetson.path()).unwrap();
        let (board, _) = board.unwrap();
        assert_eq!(board.name, "jetson-orin-nano");
        let expected = [
            "model      NVIDIA Jetson Orin Nano Developer Kit",
            "system     Jetson Linux 36.4.3",
            "cores      2",
            "memory     7620 MiB",
        ];
        assert_eq!(lines_of_machine(&machine), expected);
        let power_mw = telemetry.power_mw(&board.telemetry.total_rails);
        let expected = [
            "clock      cores 0 1: 729 MHz of 115 to 1510, governor schedutil",
            "power      VDD_IN: 5113 mW (5072 mV, 1008 mA)",
            "power      the whole module: 5113 mW",
            "absent     temperatures (no readable zone in /sys/class/thermal)",
            "absent     throttling (no get_throttled of a Raspberry Pi's firmware)",
        ];
        assert_eq!(lines_of_telemetry(&telemetry, power_mw), expected);
    }

    #[test]
    fn a_board_in_one_line() {
        let pi = |throttled: &str| {
            let tree = tree(&[
                ("proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0\0"),
                ("sys/class/thermal/thermal_zone0/type", "cpu-thermal\n"),
                ("sys/class/thermal/thermal_zone0/temp", "81250\n"),
                ("sys/class/thermal/thermal_zone1/type", "rp1_adc\n"),
                ("sys/class/thermal/thermal_zone1/temp", "95000\n"),
                ("sys/devices/platform/soc/soc:firmware/get_throttled", throttled),
            ]);
            one_line(tree.path()).unwrap()
        };
        assert_eq!(pi("a0008"), "Raspberry Pi 5, 81.2 °C, HELD BACK: soft temperature limit");
        // It was, and is no more.
        assert_eq!(pi("50000"), "Raspberry Pi 5, 81.2 °C");
    }
}
