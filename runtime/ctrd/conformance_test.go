package ctrd_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd"
	"github.com/workspaced/workspaced/runtime/ctrd/ctrdtest"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/server/workspace"
)

var (
	_ workspace.Runtime   = (*ctrd.Driver)(nil)
	_ runtimetest.Runtime = (*ctrd.Driver)(nil)
)

// onEach runs the test against every version of containerd that is here.
func onEach(t *testing.T, test func(t *testing.T, c *ctrdtest.Containerd)) {
	for _, version := range []string{ctrdtest.System, ctrdtest.V23} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			test(t, ctrdtest.StartContainerd(t, version))
		})
	}
}

const (
	imageRef     = "registry.test/testprog:1"
	noCommandRef = "registry.test/nocommand:1"
)

func TestConformance(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		image := ctrdtest.SaveImage(t, imageRef, ctrdtest.TestImage(t))
		noCommand := ctrdtest.SaveImage(t, noCommandRef, ctrdtest.NoCommandImage(t))
		registry := ctrdtest.StartRegistry(t, ctrdtest.Plain)
		runtimetest.Conformance(t, runtimetest.Harness{
			New: func(t *testing.T) *runtimetest.World {
				e := ctrdtest.NewEnv(t, c)
				d := e.NewDriver(t, nil)
				importFile(t, d, image)
				importFile(t, d, noCommand)
				return newWorld(t, e, d)
			},
			Image:             imageRef,
			Entrypoint:        []string{ctrdtest.Prog},
			Cmd:               []string{"serve"},
			Env:               ctrdtest.TestEnv,
			MissingImage:      registry.Host + "/missing:1",
			NoCommandImage:    noCommandRef,
			Ignore:            []string{ctrdtest.Prog, "ignore"},
			ExitWith:          func(code int) []string { return []string{"testprog", "exit", strconv.Itoa(code)} },
			NotFound:          []string{"nosuchcommand"},
			NotExecutable:     []string{ctrdtest.NotExecutable},
			WrongArchitecture: []string{ctrdtest.WrongArchitecture},
			ExecFails:         []string{ctrdtest.Broken},
			User:              ctrdtest.UserName,
			UserID:            ctrdtest.UserID,
			GroupID:           ctrdtest.GroupID,
			WorkingDir:        ctrdtest.WorkingDir,
			MissingHostPath:   filepath.Join(c.Dir, "missing"),
			HostPath:          func(t *testing.T) string { return t.TempDir() },
			Limits:            runtime.Resources{CPUMillis: 500, MemoryBytes: 128 << 20, Pids: 50},
		})
	})
}

func importFile(t testing.TB, d *ctrd.Driver, path string) {
	t.Helper()
	if _, err := d.ImportFile(t.Context(), path); err != nil {
		t.Fatalf("import: %v", err)
	}
}

// settled returns from Start once the command handles its signals. The suite
// means the command's answer to a signal, not what happens to a process that is
// a millisecond old.
type settled struct {
	*ctrd.Driver
	t *testing.T
}

func (s settled) Start(ctx context.Context, id string, launch runtime.Launch) (runtime.Instance, error) {
	in, err := s.Driver.Start(ctx, id, launch)
	if err == nil {
		ctrdtest.AwaitReady(s.t, in.PID)
	}
	return in, err
}

func newWorld(t *testing.T, e *ctrdtest.Env, d *ctrd.Driver) *runtimetest.World {
	proc := func(in runtime.Instance, name string) string { return fmt.Sprintf("/proc/%d/%s", in.PID, name) }
	read := func(t *testing.T, path string) string {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Error(err)
		}
		return string(b)
	}
	list := func(t *testing.T, path string) []string {
		t.Helper()
		return strings.Split(strings.TrimSuffix(read(t, path), "\x00"), "\x00")
	}
	policy := e.Config().Policy
	return &runtimetest.World{
		Runtime: settled{d, t},
		Restart: func(t *testing.T, down func()) runtimetest.Runtime {
			d.Close()
			down()
			d = e.NewDriver(t, func(cfg *ctrd.Config) { cfg.Policy = policy })
			return settled{d, t}
		},
		SetPolicy: func(_ *testing.T, p runtime.Policy) { policy = p },
		Leaks:     func(t *testing.T) []string { return e.Leaks(t, nil) },
		Signal: func(t *testing.T, in runtime.Instance, signal syscall.Signal) {
			if err := syscall.Kill(in.PID, signal); err != nil {
				t.Errorf("kill: %v", err)
			}
			ctrdtest.Eventually(t, "the process ends", func() bool { return ctrdtest.Ended(in.PID) })
		},
		Args: func(t *testing.T, in runtime.Instance) []string { return list(t, proc(in, "cmdline")) },
		Env:  func(t *testing.T, in runtime.Instance) []string { return list(t, proc(in, "environ")) },
		WorkingDir: func(t *testing.T, in runtime.Instance) string {
			dir, err := os.Readlink(proc(in, "cwd"))
			if err != nil {
				t.Error(err)
			}
			return dir
		},
		IDs: func(t *testing.T, in runtime.Instance) (uid, gid int) {
			for line := range strings.Lines(read(t, proc(in, "status"))) {
				fields := strings.Fields(line)
				switch fields[0] {
				case "Uid:":
					uid, _ = strconv.Atoi(fields[1])
				case "Gid:":
					gid, _ = strconv.Atoi(fields[1])
				}
			}
			return uid, gid
		},
		Limits: func(t *testing.T, in runtime.Instance) runtime.Resources { return limits(t, in.PID) },
		ReadFile: func(t *testing.T, in runtime.Instance, name string) (string, error) {
			b, err := os.ReadFile(proc(in, "root"+name))
			return string(b), err
		},
		WriteFile: func(t *testing.T, in runtime.Instance, name, data string) error {
			return os.WriteFile(proc(in, "root"+name), []byte(data), 0o644)
		},
		AddForeign: func(t *testing.T, uid string) func() { return e.AddForeign(t, uid) },
		HasLog: func(t *testing.T, workspaceID string) bool {
			_, err := os.Stat(filepath.Join(e.DataDir, "logs", workspaceID+".log"))
			return err == nil
		},
	}
}

// limits reads those of the process's cgroups, v1's and v2's.
func limits(t *testing.T, pid int) runtime.Resources {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	numbers := func(controller, path, file string) []int64 {
		for _, point := range []string{"/sys/fs/cgroup/" + controller, "/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
			text, err := os.ReadFile(filepath.Join(point, path, file))
			if err != nil {
				continue
			}
			var ns []int64
			for _, f := range strings.Fields(string(text)) {
				n, err := strconv.ParseInt(f, 10, 64)
				if err != nil {
					return nil // "max"
				}
				ns = append(ns, n)
			}
			return ns
		}
		return nil
	}
	var r runtime.Resources
	set := func(to *int64, ns []int64) {
		if len(ns) > 0 {
			*to = ns[0]
		}
	}
	for line := range strings.Lines(string(b)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		path := parts[2]
		for controller := range strings.SplitSeq(parts[1], ",") {
			switch controller {
			case "memory":
				set(&r.MemoryBytes, numbers(controller, path, "memory.limit_in_bytes"))
			case "pids":
				set(&r.Pids, numbers(controller, path, "pids.max"))
			case "cpu":
				quota, period := numbers(controller, path, "cpu.cfs_quota_us"), numbers(controller, path, "cpu.cfs_period_us")
				if len(quota) > 0 && len(period) > 0 {
					r.CPUMillis = quota[0] * 1000 / period[0]
				}
			case "":
				set(&r.MemoryBytes, numbers("", path, "memory.max"))
				set(&r.Pids, numbers("", path, "pids.max"))
				if ns := numbers("", path, "cpu.max"); len(ns) == 2 {
					r.CPUMillis = ns[0] * 1000 / ns[1]
				}
			}
		}
	}
	return r
}
