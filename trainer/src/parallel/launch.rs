//! Which rank this process is, by the environment that a launcher set.

/// A process among those that a launcher started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Its number.
    pub rank: usize,
    /// How many there are, at least 2.
    pub ranks: usize,
    /// Host where rank 0 waits for the others.
    pub host: String,
    /// Port there.
    pub port: u16,
    /// The launcher's name for the job, so that ranks of two jobs do not meet; may be empty.
    pub job: String,
}

/// An environment that does not say which rank this process is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    /// One of two variables that belong together.
    #[error("{set} is set and {missing} is not: which rank this process is, of how many, remains unsaid")]
    HalfSet {
        /// Found.
        set: &'static str,
        /// Not found.
        missing: &'static str,
    },
    /// A variable that should be a number.
    #[error("{name} is `{value}`, which is not a {what}")]
    NotANumber {
        /// Variable.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        what: &'static str,
    },
    /// A rank that its number of ranks does not have.
    #[error("{name} is {rank}, and there are {ranks} ranks, counted from 0")]
    OutOfRange {
        /// Variable of the rank.
        name: &'static str,
        /// Its value.
        rank: usize,
        /// Number of ranks.
        ranks: usize,
    },
    /// Two launchers' variables that differ.
    #[error(
        "{first} says rank {} of {}, {second} says rank {} of {}: unset the variables that are not meant",
        of_first.0, of_first.1, of_second.0, of_second.1
    )]
    Contradiction {
        /// Variable.
        first: &'static str,
        /// Rank and ranks that it speaks of.
        of_first: (usize, usize),
        /// Another one.
        second: &'static str,
        /// Rank and ranks that it speaks of.
        of_second: (usize, usize),
    },
    /// A batch script's environment.
    #[error(
        "SLURM_NTASKS is {ntasks}, and this process was not started by srun: start it with srun, or unset SLURM_NTASKS to train with \
         one rank"
    )]
    NotASlurmStep {
        /// Its value.
        ntasks: String,
    },
    /// Where rank 0 waits is not known.
    #[error("where rank 0 of the {ranks} is, remains unsaid: set MASTER_ADDR (and MASTER_PORT) to its host, for every rank")]
    NoAddress {
        /// Number of ranks.
        ranks: usize,
    },
}

/// Port of a job without a name, where none is given.
const DEFAULT_PORT: u16 = 29500;

/// A launcher's pair of variables.
struct Said {
    name: &'static str,
    rank: usize,
    ranks: usize,
}

impl Said {
    fn pair(&self) -> (usize, usize) {
        (self.rank, self.ranks)
    }
}

/// The environment.
struct Environment<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Environment<'_> {
    fn text(&self, name: &str) -> Option<String> {
        (self.0)(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
    }

    fn number(&self, name: &'static str) -> Result<Option<usize>, LaunchError> {
        let Some(value) = self.text(name) else { return Ok(None) };
        match value.parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(LaunchError::NotANumber { name, value, what: "number" }),
        }
    }

    /// A rank and the number of ranks, both set or neither.
    fn said(&self, rank: &'static str, ranks: &'static str) -> Result<Option<Said>, LaunchError> {
        match (self.number(rank)?, self.number(ranks)?) {
            (None, None) => Ok(None),
            (Some(_), None) => Err(LaunchError::HalfSet { set: rank, missing: ranks }),
            (None, Some(_)) => Err(LaunchError::HalfSet { set: ranks, missing: rank }),
            (Some(number), Some(count)) if number >= count => {
                Err(LaunchError::OutOfRange { name: rank, rank: number, ranks: count })
            }
            (Some(number), Some(count)) => Ok(Some(Said { name: rank, rank: number, ranks: count })),
        }
    }

    /// srun's. A batch script itself is task 0 of as many as it asked for, and nobody started the others.
    fn slurm(&self) -> Result<Option<Said>, LaunchError> {
        if self.text("SLURM_STEP_NODELIST").is_some() {
            let ranks = if self.text("SLURM_STEP_NUM_TASKS").is_some() { "SLURM_STEP_NUM_TASKS" } else { "SLURM_NTASKS" };
            return self.said("SLURM_PROCID", ranks);
        }
        match self.text("SLURM_NTASKS") {
            Some(ntasks) if ntasks != "1" => Err(LaunchError::NotASlurmStep { ntasks }),
            _ => Ok(None),
        }
    }

    fn port(&self) -> Result<Option<u16>, LaunchError> {
        let Some(value) = self.text("MASTER_PORT") else { return Ok(None) };
        match value.parse() {
            Ok(port) if port > 0 => Ok(Some(port)),
            _ => Err(LaunchError::NotANumber { name: "MASTER_PORT", value, what: "port" }),
        }
    }
}

impl Launch {
    /// Reads the variables of torchrun (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`), Open MPI
    /// (`OMPI_COMM_WORLD_RANK`, …`SIZE`), MPICH and its kin (`PMI_RANK`, `PMI_SIZE`) and srun (`SLURM_PROCID`, …), the first of
    /// these that are set; `variable` gives a variable's value. Nothing where no launcher started this process, or only it.
    ///
    /// # Errors
    /// Variables that are half set, are no numbers, or contradict each other; ranks on several hosts without `MASTER_ADDR`.
    pub fn from_environment(variable: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>, LaunchError> {
        let from = Environment(variable);
        let torch = from.said("RANK", "WORLD_SIZE")?;
        // torchrun may have been started by another launcher, once a host: then its own variables are the ones meant.
        if let (Some(said), Some(id)) = (&torch, from.text("TORCHELASTIC_RUN_ID")) {
            return from.torch(said, &id);
        }
        let open_mpi = from.said("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")?;
        let mpich = from.said("PMI_RANK", "PMI_SIZE")?;
        // mpirun inside a batch job starts its daemons with srun: their numbers are not the ranks'.
        let mpi = open_mpi.is_some() || mpich.is_some();
        let slurm = if mpi { None } else { from.slurm()? };
        let mut all = [&torch, &open_mpi, &mpich, &slurm].into_iter().flatten();
        let Some(first) = all.next() else { return Ok(None) };
        if let Some(second) = all.find(|second| second.pair() != first.pair()) {
            let (of_first, of_second) = (first.pair(), second.pair());
            return Err(LaunchError::Contradiction { first: first.name, of_first, second: second.name, of_second });
        }
        if torch.is_some() {
            return from.torch(first, "");
        }
        let (job, local) = if open_mpi.is_some() {
            let job = from.text("PMIX_NAMESPACE").or_else(|| from.text("OMPI_MCA_ess_base_jobid"));
            (job, from.number("OMPI_COMM_WORLD_LOCAL_SIZE")? == Some(first.ranks))
        } else if mpich.is_some() {
            let local = from.number("MPI_LOCALNRANKS")?.or(from.number("PMI_LOCAL_SIZE")?);
            (from.text("PMI_JOBID"), local == Some(first.ranks))
        } else {
            let job = from.text("SLURM_JOB_ID").map(|job| job + "." + &from.text("SLURM_STEP_ID").unwrap_or_default());
            (job, false)
        };
        let nodes = from.text("SLURM_STEP_NODELIST").filter(|_| slurm.is_some());
        let host = match (from.text("MASTER_ADDR"), nodes) {
            (Some(host), _) => host,
            (None, Some(nodes)) => first_host(&nodes),
            (None, None) if local => "127.0.0.1".to_owned(),
            (None, None) if first.ranks == 1 => String::new(),
            (None, None) => return Err(LaunchError::NoAddress { ranks: first.ranks }),
        };
        let job = job.unwrap_or_default();
        let port = from.port()?.unwrap_or_else(|| port_of(&job));
        Ok((first.ranks > 1).then_some(Self { rank: first.rank, ranks: first.ranks, host, port, job }))
    }
}

impl Environment<'_> {
    fn torch(&self, said: &Said, id: &str) -> Result<Option<Launch>, LaunchError> {
        if said.ranks == 1 {
            return Ok(None);
        }
        let host = self.text("MASTER_ADDR").ok_or(LaunchError::HalfSet { set: "RANK", missing: "MASTER_ADDR" })?;
        let port = self.port()?.ok_or(LaunchError::HalfSet { set: "RANK", missing: "MASTER_PORT" })?;
        // torchrun's own agent listens at MASTER_PORT then.
        let taken = self.text("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True");
        let port = if taken { port.checked_add(1).unwrap_or(DEFAULT_PORT) } else { port };
        Ok(Some(Launch { rank: said.rank, ranks: said.ranks, host, port, job: id.to_owned() }))
    }
}

/// A port of the job's own between 20000 and 30000, below those that Linux gives to connections.
fn port_of(job: &str) -> u16 {
    if job.is_empty() {
        return DEFAULT_PORT;
    }
    20000 + (crate::seed::mix(job.bytes().fold(0, |sum, byte| crate::seed::mix(sum, u64::from(byte))), 0) % 10000) as u16
}

/// The first host of SLURM's list: `node[07-09,12],other` starts with `node07`.
fn first_host(list: &str) -> String {
    let end = list.find(['[', ',']).unwrap_or(list.len());
    let mut host = list[..end].to_owned();
    if let Some(range) = list[end..].strip_prefix('[') {
        let (number, after) = range.split_once(']').unwrap_or((range, ""));
        host += &number[..number.find(['-', ',']).unwrap_or(number.len())];
        host += &after[..after.find([',', '[']).unwrap_or(after.len())];
    }
    host
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &str) -> Result<Option<Launch>, LaunchError> {
        let found = |name: &str| {
            let of = |pair: &str| pair.split_once('=').filter(|(n, _)| *n == name).map(|(_, value)| value.to_owned());
            variables.split_whitespace().find_map(of)
        };
        Launch::from_environment(&found)
    }

    #[test]
    fn every_launchers_variables_are_understood() {
        let launch = |rank, ranks, host: &str, port, job: &str| Launch { rank, ranks, host: host.into(), port, job: job.into() };
        let torch = "RANK=1 WORLD_SIZE=4 MASTER_ADDR=node7 MASTER_PORT=29400";
        let agent = "TORCHELASTIC_RUN_ID=r1 TORCHELASTIC_USE_AGENT_STORE=True";
        let open_mpi = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_SIZE=2 PMIX_NAMESPACE=117";
        let slurm = "SLURM_PROCID=2 SLURM_NTASKS=3 SLURM_STEP_NODELIST=gpu[07-09],x SLURM_JOB_ID=42 SLURM_STEP_ID=0";
        for (variables, expected) in [
            (torch.to_owned(), launch(1, 4, "node7", 29400, "")),
            // The agent has the port itself.
            (format!("{torch} {agent}"), launch(1, 4, "node7", 29401, "r1")),
            // torchrun inside an srun of one task a host, and inside a batch script.
            (format!("{torch} {agent} {slurm}"), launch(1, 4, "node7", 29401, "r1")),
            (format!("{torch} {agent} SLURM_NTASKS=8 SLURM_PROCID=0"), launch(1, 4, "node7", 29401, "r1")),
            (open_mpi.to_owned(), launch(1, 2, "127.0.0.1", port_of("117"), "117")),
            (format!("{open_mpi} MASTER_ADDR=h MASTER_PORT=5"), launch(1, 2, "h", 5, "117")),
            // mpirun's daemons are a SLURM step of their own.
            (format!("{open_mpi} SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_STEP_NODELIST=a"), {
                launch(1, 2, "127.0.0.1", port_of("117"), "117")
            }),
            ("PMI_RANK=0 PMI_SIZE=2 MPI_LOCALNRANKS=2".into(), launch(0, 2, "127.0.0.1", DEFAULT_PORT, "")),
            (slurm.to_owned(), launch(2, 3, "gpu07", port_of("42.0"), "42.0")),
            ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1 OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2".into(), {
                launch(0, 2, "a", 1, "")
            }),
        ] {
            assert_eq!(read(&variables).unwrap().unwrap(), expected, "{variables}");
        }
        assert!((20000..30000).contains(&port_of("117")) && port_of("117") != port_of("118"));
    }

    #[test]
    fn without_a_launcher_or_with_one_process_there_is_one_rank() {
        for variables in [
            "",
            "MASTER_ADDR=node7 MASTER_PORT=29400",
            "RANK=0 WORLD_SIZE=1",
            "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1",
            "PMI_RANK=0 PMI_SIZE=1",
            "SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_STEP_NODELIST=a",
            "SLURM_JOB_ID=3 SLURM_NTASKS=1 SLURM_PROCID=0",
        ] {
            assert_eq!(read(variables).unwrap(), None, "{variables}");
        }
    }

    #[test]
    fn half_set_and_contradictory_environments_are_told() {
        for (variables, says) in [
            ("RANK=0", "RANK is set and WORLD_SIZE is not"),
            ("WORLD_SIZE=2", "WORLD_SIZE is set and RANK is not"),
            ("RANK=0 WORLD_SIZE=2", "MASTER_ADDR is not"),
            ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a", "MASTER_PORT is not"),
            ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=70000", "MASTER_PORT is `70000`, which is not a port"),
            ("RANK=one WORLD_SIZE=2", "RANK is `one`"),
            ("RANK=2 WORLD_SIZE=2", "RANK is 2, and there are 2 ranks"),
            ("OMPI_COMM_WORLD_RANK=0", "OMPI_COMM_WORLD_SIZE is not"),
            ("OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_SIZE=1", "set MASTER_ADDR"),
            ("PMI_RANK=0 PMI_SIZE=2", "set MASTER_ADDR"),
            ("SLURM_PROCID=0 SLURM_NTASKS=4", "not started by srun"),
            ("SLURM_NTASKS=4 SLURM_STEP_NODELIST=a", "SLURM_PROCID is not"),
            (
                "RANK=0 WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2",
                "RANK says rank 0 of 2, OMPI_COMM_WORLD_RANK says rank 1 of 2",
            ),
            ("RANK=0 WORLD_SIZE=2 SLURM_PROCID=0 SLURM_NTASKS=3 SLURM_STEP_NODELIST=a", "SLURM_PROCID says rank 0 of 3"),
        ] {
            let error = read(variables).unwrap_err().to_string();
            assert!(error.contains(says) && !error.contains('\n'), "{variables}: {error}");
        }
    }

    #[test]
    fn the_first_host_of_a_list_is_found() {
        for (list, first) in [
            ("node7", "node7"),
            ("node7,node8", "node7"),
            ("node[07-09,12],other", "node07"),
            ("rack[3,5]-node", "rack3-node"),
            ("gpu[1]", "gpu1"),
        ] {
            assert_eq!(first_host(list), first, "{list}");
        }
    }
}
