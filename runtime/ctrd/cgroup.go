package ctrd

import (
	"bufio"
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// removeCgroups removes an empty cgroup from every hierarchy. The OCI runtime
// has removed those of a container that it deleted; this is for the parent,
// and for what a crash left. One that is not empty stays.
func (d *Driver) removeCgroups(path string) {
	for _, point := range d.cgroups {
		_ = os.Remove(filepath.Join(point, path)) // rmdir(2); there is none, or it is in use
	}
}

// oomKills returns how many processes of the cgroup the kernel has killed for
// want of memory: memory.events of v2, memory.oom_control of v1.
func (d *Driver) oomKills(path string) int {
	for _, point := range d.cgroups {
		for _, file := range []string{"memory.events", "memory.oom_control"} {
			b, err := os.ReadFile(filepath.Join(point, path, file))
			if err != nil {
				continue
			}
			for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
				if v, ok := strings.CutPrefix(lines.Text(), "oom_kill "); ok {
					if n, err := strconv.Atoi(strings.TrimSpace(v)); err == nil {
						return n
					}
				}
			}
		}
	}
	return 0
}
