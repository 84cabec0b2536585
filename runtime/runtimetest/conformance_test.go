package runtimetest_test

import (
	"cmp"
	"context"
	"fmt"
	"syscall"
	"testing"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
)

func TestFakeConformance(t *testing.T) { runtimetest.Conformance(t, fakeHarness()) }

func fakeHarness() runtimetest.Harness {
	refuse := func(reason runtime.Reason) runtimetest.Command {
		return runtimetest.Command{PrepareErr: &runtime.Error{Reason: reason, Message: "it can't", Permanent: true}}
	}
	commands := map[string]runtimetest.Command{
		"/app":     {},
		"/ignore":  {StopDelay: -1},
		"/noexec":  refuse(runtime.ReasonCommandNotExecutable),
		"/foreign": refuse(runtime.ReasonWrongArchitecture),
		"/refused": runtimetest.ExecFailure,
	}
	exitWith := func(code int) string { return fmt.Sprintf("/exit-%d", code) }
	for code := range 64 {
		commands[exitWith(code)] = runtimetest.Command{Exit: &runtime.Exit{Code: code, Known: true}}
	}
	h := runtimetest.Harness{
		Image:             image,
		Entrypoint:        []string{"/app"},
		Cmd:               []string{"serve"},
		Env:               []string{"PATH=/bin", "IMAGE=yes"},
		MissingImage:      "registry.test/missing:1",
		NoCommandImage:    "registry.test/nothing:1",
		Ignore:            []string{"/ignore"},
		ExitWith:          func(code int) []string { return []string{exitWith(code)} },
		NotFound:          []string{"/none"},
		NotExecutable:     []string{"/noexec"},
		WrongArchitecture: []string{"/foreign"},
		ExecFails:         []string{"/refused"},
		User:              "app",
		UserID:            1000,
		GroupID:           1000,
		WorkingDir:        "/srv",
		MissingHostPath:   "/missing",
		HostPath:          func(*testing.T) string { return "/shared" },
		Limits:            runtime.Resources{CPUMillis: 500, MemoryBytes: 64 << 20, Pids: 50},
	}
	h.New = func(*testing.T) *runtimetest.World {
		f := runtimetest.NewFake()
		f.AddImage(h.Image, runtimetest.Image{
			Env: h.Env, Entrypoint: h.Entrypoint, Cmd: h.Cmd, Commands: commands, Exact: true,
			Users: []string{"app"}, Dirs: []string{"/srv"},
		})
		f.AddImage(h.NoCommandImage, runtimetest.Image{})
		f.SetHostPathMissing(h.MissingHostPath, true)
		return fakeWorld(f)
	}
	return h
}

func fakeWorld(f *runtimetest.Fake) *runtimetest.World {
	launched := func(in runtime.Instance) runtimetest.Launched {
		for _, l := range f.Launches("") {
			if l.Instance.ID == in.ID {
				return l
			}
		}
		return runtimetest.Launched{}
	}
	return &runtimetest.World{
		Runtime: f.Daemon(),
		Restart: func(_ *testing.T, down func()) runtimetest.Runtime {
			f.Crash()
			down()
			return f.Daemon()
		},
		SetPolicy: func(_ *testing.T, p runtime.Policy) { f.SetPolicy(p) },
		Leaks: func(*testing.T) []string {
			var leaks []string
			for _, in := range f.Instances() {
				leaks = append(leaks, "instance "+in.ID)
			}
			for _, id := range []string{"a", "b", "old", "w0"} {
				if f.HasLog(id) || len(f.Volumes(id)) != 0 {
					leaks = append(leaks, "workspace "+id)
				}
			}
			return leaks
		},
		Signal: func(_ *testing.T, in runtime.Instance, signal syscall.Signal) {
			f.Exit(in.ID, runtime.Exit{Code: 128 + int(signal), Signal: int(signal), Known: true})
		},
		Args: func(_ *testing.T, in runtime.Instance) []string { return launched(in).Argv },
		Env:  func(_ *testing.T, in runtime.Instance) []string { return f.Env(in.ID) },
		WorkingDir: func(_ *testing.T, in runtime.Instance) string {
			return cmp.Or(launched(in).Spec.WorkingDir, "/")
		},
		IDs: func(_ *testing.T, in runtime.Instance) (uid, gid int) {
			user := launched(in).Spec.User
			if user == "app" {
				return 1000, 1000
			}
			_, _ = fmt.Sscanf(user, "%d:%d", &uid, &gid)
			return uid, gid
		},
		Limits: func(_ *testing.T, in runtime.Instance) runtime.Resources {
			spec := launched(in).Spec
			limits := spec.Resources
			limits.Pids = spec.PidsLimit()
			return limits
		},
		ReadFile: func(_ *testing.T, in runtime.Instance, name string) (string, error) {
			return f.ReadFile(in.ID, name)
		},
		WriteFile: func(_ *testing.T, in runtime.Instance, name, data string) error {
			return f.WriteFile(in.ID, name, data)
		},
		AddForeign: func(_ *testing.T, uid string) func() {
			change := func(by int) {
				foreign, _ := f.Foreign(context.Background())
				f.SetForeign(uid, foreign[uid]+by)
			}
			change(1)
			return func() { change(-1) }
		},
		HasLog: func(_ *testing.T, id string) bool { return f.HasLog(id) },
	}
}
