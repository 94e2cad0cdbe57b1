"""Pages of docs/ made of results, a file each: `page` gives what `PATH` holds, from the newest of `BENCHMARK`."""
