package runtimetest

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/workspaced/workspaced/runtime"
)

// restart ends the daemon and makes the next one's runtime the suite's.
func (s *suite) restart(down func()) {
	s.Helper()
	s.need("Restart", s.w.Restart != nil)
	if down == nil {
		down = func() {}
	}
	s.r = s.w.Restart(s.T, down)
}

var crashProperties = []property{
	{"what runs is found again as it was started, and can be stopped", func(s *suite) {
		in := s.start(s.prepare(s.spec("a", 2)).ID, runtime.Launch{
			Generation: 5, SecretVersions: map[string]int64{"KEY": 9}, Env: []string{"KEY=value"},
		})
		s.restart(nil)
		s.wantSame(in)
		if s.w.Env != nil && !slices.Contains(s.w.Env(s.T, in), "KEY=value") {
			s.Error("the command's environment is another one after the restart")
		}
		ctx, cancel := context.WithTimeout(s.ctx, deadline)
		defer cancel()
		exits := make(chan runtime.Exit, 1)
		go func() {
			exit, err := Wait(ctx, s.r, in.ID)
			if err != nil {
				s.Errorf("Wait: %v", err)
			}
			exits <- exit
		}()
		s.stop(in.ID)
		if exit := <-exits; exit.Known && exit.Code != 0 {
			s.Errorf("exit = %+v, want code 0", exit)
		}
		s.wantPhase(in.ID, runtime.PhaseExited)
	}},
	{"a standby does not outlive its daemon and is never started", func(s *suite) {
		old := s.run(s.spec("a", 1))
		in := s.prepare(s.spec("a", 2))
		s.restart(nil)
		s.wantPhase(in.ID, runtime.PhaseRemnant)
		if _, err := s.r.Start(s.ctx, in.ID, runtime.Launch{Generation: 2}); err == nil {
			s.Error("a remnant was started")
		}
		s.wantPhase(in.ID, runtime.PhaseRemnant)
		s.remove(in.ID)
		s.wantSame(old)
	}},
	{"what ended before is still exited", func(s *suite) {
		in := s.run(s.spec("a", 3))
		s.stop(in.ID)
		s.restart(nil)
		if got := s.wantPhase(in.ID, runtime.PhaseExited); got.Generation != 3 || got.Exit == nil {
			s.Errorf("instance = %+v, want generation 3 and an exit", got)
		}
		s.wait(in.ID)
		s.stop(in.ID)
	}},
	{"what ends while there is no daemon is exited for the next one", func(s *suite) {
		s.need("Signal", s.w.Signal != nil)
		in := s.start(s.prepare(s.spec("a", 3)).ID, runtime.Launch{Generation: 4})
		s.restart(func() { s.w.Signal(s.T, in, syscall.SIGKILL) })
		exit := s.wait(in.ID)
		if exit.Known && (exit.Code != 137 || exit.Signal != 9) {
			s.Errorf("exit = %+v, want code 137 and signal 9 or none known", exit)
		}
		if got := s.wantPhase(in.ID, runtime.PhaseExited); got.Generation != 4 {
			s.Errorf("generation on record = %d, want 4", got.Generation)
		}
	}},
	{"a daemon's second life goes on where the first one stopped", func(s *suite) {
		old := s.run(s.spec("a", 1))
		s.restart(nil)
		next := s.prepare(s.spec("a", 2))
		if next.ID == old.ID {
			s.Errorf("two instances have the id %s", old.ID)
		}
		s.stop(old.ID)
		started := s.start(next.ID, runtime.Launch{Generation: 2})
		s.remove(old.ID)
		s.restart(nil)
		s.wantSame(started)
	}},
}

var containerProperties = []property{
	{"command and arguments are the spec's over the image's", func(s *suite) {
		s.need("Args", s.w.Args != nil)
		tests := []struct{ command, args, want []string }{
			{nil, nil, slices.Concat(s.h.Entrypoint, s.h.Cmd)},
			{nil, []string{"one", "two words"}, slices.Concat(s.h.Entrypoint, []string{"one", "two words"})},
			{s.h.Ignore, nil, s.h.Ignore},
			{s.h.Ignore, []string{"more"}, slices.Concat(s.h.Ignore, []string{"more"})},
		}
		for _, test := range tests {
			spec := s.spec("a", 1)
			spec.Command, spec.Args = test.command, test.args
			in := s.run(spec)
			if got := s.w.Args(s.T, in); !slices.Equal(got, test.want) {
				s.Errorf("command %q with args %q is %q, want %q", test.command, test.args, got, test.want)
			}
			s.remove(in.ID)
		}
	}},
	{"user and working directory are the spec's", func(s *suite) {
		s.need("IDs", s.w.IDs != nil)
		s.need("WorkingDir", s.w.WorkingDir != nil)
		tests := []struct {
			user, dir string
			uid, gid  int
			wantDir   string
		}{
			{"", "", 0, 0, "/"},
			{s.h.User, s.h.WorkingDir, s.h.UserID, s.h.GroupID, s.h.WorkingDir},
			{"12345:54321", "", 12345, 54321, "/"},
		}
		for _, test := range tests {
			spec := s.spec("a", 1)
			spec.User, spec.WorkingDir = test.user, test.dir
			in := s.run(spec)
			if uid, gid := s.w.IDs(s.T, in); uid != test.uid || gid != test.gid {
				s.Errorf("user %q is %d:%d, want %d:%d", test.user, uid, gid, test.uid, test.gid)
			}
			if got := s.w.WorkingDir(s.T, in); got != test.wantDir {
				s.Errorf("working directory %q is %q, want %q", test.dir, got, test.wantDir)
			}
			s.remove(in.ID)
		}
	}},
	{"limits hold", func(s *suite) {
		s.need("Limits", s.w.Limits != nil)
		spec := s.spec("a", 1)
		spec.Resources = s.h.Limits
		if got := s.w.Limits(s.T, s.run(spec)); got != s.h.Limits {
			s.Errorf("limits = %+v, want %+v", got, s.h.Limits)
		}
		for profile, want := range map[runtime.Profile]int64{"": runtime.DefaultPids, runtime.ProfilePrivileged: 0} {
			spec := s.spec("b", 1)
			spec.Profile = profile
			in := s.run(spec)
			if got := s.w.Limits(s.T, in); got.Pids != want {
				s.Errorf("profile %q without a limit has %d processes, want %d", profile, got.Pids, want)
			}
			s.remove(in.ID)
		}
	}},
	{"what the settings don't allow is NOT_ALLOWED, and the older instance runs on", func(s *suite) {
		s.need("SetPolicy", s.w.SetPolicy != nil && s.h.HostPath != nil)
		host := s.h.HostPath(s.T)
		with := func(path string) func(*runtime.Spec) {
			return func(spec *runtime.Spec) { spec.Mounts = []runtime.Mount{{Path: "/host", HostPath: path}} }
		}
		profile := func(p runtime.Profile) func(*runtime.Spec) {
			return func(spec *runtime.Spec) { spec.Profile = p }
		}
		privileged := s.spec("a", 1)
		profile(runtime.ProfilePrivileged)(&privileged)
		with("/")(&privileged)
		old := s.run(privileged)
		s.w.SetPolicy(s.T, runtime.Policy{HostPaths: []string{"/no/such", host}})
		s.restart(nil)
		for name, edit := range map[string]func(*runtime.Spec){
			"privileged":               profile(runtime.ProfilePrivileged),
			"no profile":               profile("restricted"),
			"the host's root":          with("/"),
			"a name that begins alike": with(host + "-other"),
			"what a host path lies in": with(path.Dir(host)),
			"one of two that are asked": func(spec *runtime.Spec) {
				with(host)(spec)
				spec.Mounts = append(spec.Mounts, runtime.Mount{Path: "/etc", HostPath: "/etc"})
			},
		} {
			spec := s.spec("a", 2)
			edit(&spec)
			in, err := s.r.Prepare(s.ctx, spec)
			if err == nil {
				s.Errorf("%s was prepared", name)
				s.remove(in.ID)
				continue
			}
			s.wantReason(err, runtime.ReasonNotAllowed, false)
		}
		s.wantSame(old)
		spec := s.spec("a", 2)
		with(host)(&spec)
		profile(runtime.ProfileBaseline)(&spec)
		s.prepare(spec)
	}},
	{"a read-only root can't be written, and the command runs", func(s *suite) {
		s.need("WriteFile", s.w.WriteFile != nil)
		spec := s.spec("a", 1)
		spec.ReadOnlyRoot = true
		spec.User = "12345:54321"
		spec.Mounts = []runtime.Mount{{Path: "/data", Volume: "data"}}
		in := s.run(spec)
		if err := s.w.WriteFile(s.T, in, "/file", "x"); !errors.Is(err, syscall.EROFS) {
			s.Errorf("writing to the root = %v, want EROFS", err)
		}
		if err := s.w.WriteFile(s.T, in, "/data/file", "x"); err != nil {
			s.Errorf("writing to a volume: %v", err)
		}
	}},
	{"files are the launch's, and can't be changed from inside", func(s *suite) {
		s.need("WriteFile", s.w.WriteFile != nil && s.w.ReadFile != nil)
		files := []runtime.File{
			{Name: "TEXT", Data: []byte("text")}, {Name: "BINARY", Data: []byte("\x00\xff\n\x00")}, {Name: "EMPTY"},
			{Name: "LARGE", Data: bytes.Repeat([]byte("0123456789abcdef"), 4<<10)},
		}
		spec := s.spec("a", 1)
		spec.User, spec.ReadOnlyRoot = "12345:54321", true
		for _, f := range files {
			spec.FileBytes += runtime.FileSize(f)
		}
		one := s.prepare(spec)
		one = s.start(one.ID, runtime.Launch{Generation: 1, Files: files})
		for _, f := range files {
			s.wantFile(one, runtime.FilesDir+"/"+f.Name, string(f.Data))
			if err := s.w.WriteFile(s.T, one, runtime.FilesDir+"/"+f.Name, "x"); !errors.Is(err, syscall.EROFS) {
				s.Errorf("writing to %s = %v, want EROFS", f.Name, err)
			}
			if s.w.Env != nil && slices.ContainsFunc(s.w.Env(s.T, one), func(kv string) bool { return strings.HasPrefix(kv, f.Name+"=") }) {
				s.Errorf("%s is a variable too", f.Name)
			}
		}
		if err := s.w.WriteFile(s.T, one, runtime.FilesDir+"/NEW", "x"); !errors.Is(err, syscall.EROFS) {
			s.Errorf("writing a new file = %v, want EROFS", err)
		}
		s.restart(nil)
		s.wantFile(one, runtime.FilesDir+"/TEXT", "text")
		// The next one's are its own.
		two := s.prepare(s.spec("a", 2))
		s.stop(one.ID)
		two = s.start(two.ID, runtime.Launch{Generation: 2, Files: []runtime.File{{Name: "TEXT", Data: []byte("other")}}})
		s.wantFile(two, runtime.FilesDir+"/TEXT", "other")
		s.wantNoFile(two, runtime.FilesDir+"/EMPTY")
	}},
	{"files are the launch's, whatever it was armed with", func(s *suite) {
		s.need("ReadFile", s.w.ReadFile != nil)
		for _, test := range []struct {
			armed, launched []runtime.File
			want            map[string]string
		}{
			{someFiles("1"), someFiles("1"), map[string]string{"A": "1", "B": "1", "C": "1"}},
			{someFiles("1"), someFiles("2"), map[string]string{"A": "2", "B": "2", "C": "2"}},
			{someFiles("1"), someFiles("1")[1:], map[string]string{"B": "1", "C": "1"}},
			{someFiles("1"), nil, nil},
			{nil, someFiles("1"), map[string]string{"A": "1", "B": "1", "C": "1"}},
		} {
			in := s.prepare(s.spec("a", 1))
			s.arm(in.ID, runtime.Launch{Generation: 1, Files: test.armed})
			in = s.start(in.ID, runtime.Launch{Generation: 1, Files: test.launched})
			s.wantFiles(in, test.want)
			s.remove(in.ID)
		}
	}},
	{"a file has the name of a variable, once", func(s *suite) {
		for _, names := range [][]string{{""}, {".."}, {"../TEXT"}, {"..data"}, {"a/b"}, {"A", "A"}, {strings.Repeat("A", 129)}} {
			var launch runtime.Launch
			for _, name := range names {
				launch.Files = append(launch.Files, runtime.File{Name: name})
			}
			in := s.prepare(s.spec("a", 1))
			if _, err := s.r.Start(s.ctx, in.ID, launch); err == nil {
				s.Errorf("an instance with the files %q was started", names)
			}
			s.wantNeverStarts(in.ID)
			s.remove(in.ID)
		}
	}},
	{"the root file system is each instance's own", func(s *suite) {
		s.need("WriteFile", s.w.WriteFile != nil && s.w.ReadFile != nil)
		one := s.run(s.spec("a", 1))
		s.write(one, "/file", "one")
		s.remove(one.ID)
		two := s.run(s.spec("a", 2))
		s.wantNoFile(two, "/file")
	}},
}

func (s *suite) write(in runtime.Instance, name, data string) {
	s.Helper()
	if err := s.w.WriteFile(s.T, in, name, data); err != nil {
		s.Fatalf("writing %s in %s: %v", name, in.ID, err)
	}
}

func (s *suite) wantFile(in runtime.Instance, name, want string) {
	s.Helper()
	if got, err := s.w.ReadFile(s.T, in, name); err != nil || got != want {
		s.Errorf("%s in %s = %q, %v, want %q", name, in.ID, got, err, want)
	}
}

func (s *suite) wantNoFile(in runtime.Instance, name string) {
	s.Helper()
	if got, err := s.w.ReadFile(s.T, in, name); !errors.Is(err, fs.ErrNotExist) {
		s.Errorf("%s in %s = %q, %v, want it not to exist", name, in.ID, got, err)
	}
}

var workspaceProperties = []property{
	{"a named volume outlives instances and belongs to one workspace", func(s *suite) {
		s.need("WriteFile", s.w.WriteFile != nil && s.w.ReadFile != nil)
		with := func(id string, generation int64, readOnly bool) runtime.Spec {
			spec := s.spec(id, generation)
			spec.Mounts = []runtime.Mount{
				{Path: "/data", Volume: "data", ReadOnly: readOnly},
				{Path: "/deep/er", Volume: "other"},
			}
			return spec
		}
		one := s.run(with("a", 1, false))
		s.write(one, "/data/file", "kept")
		s.write(one, "/deep/er/file", "other")
		two := s.prepare(with("a", 2, true))
		s.remove(one.ID)
		two = s.start(two.ID, runtime.Launch{Generation: 2})
		s.wantFile(two, "/data/file", "kept")
		s.wantFile(two, "/deep/er/file", "other")
		if err := s.w.WriteFile(s.T, two, "/data/file", "x"); !errors.Is(err, syscall.EROFS) {
			s.Errorf("writing to a read-only volume = %v, want EROFS", err)
		}
		s.wantNoFile(s.run(with("b", 1, false)), "/data/file")
	}},
	{"a mount within another is seen whatever their order", func(s *suite) {
		s.need("WriteFile", s.w.WriteFile != nil && s.w.ReadFile != nil)
		mounts := []runtime.Mount{
			{Path: "/data/cache/deep", Volume: "deep"}, {Path: "/data/cache", Volume: "cache"}, {Path: "/data", Volume: "data"},
		}
		spec := s.spec("a", 1)
		spec.Mounts = mounts
		in := s.run(spec)
		for _, m := range mounts {
			s.write(in, m.Path+"/file", "of "+m.Volume)
		}
		// Each is in its own volume, as who mounts them elsewhere sees.
		next := s.spec("a", 2)
		next.Mounts = []runtime.Mount{
			{Path: "/one", Volume: "deep"}, {Path: "/two", Volume: "cache"}, {Path: "/three", Volume: "data"},
		}
		other := s.prepare(next)
		s.stop(in.ID)
		other = s.start(other.ID, runtime.Launch{Generation: 2})
		for _, m := range next.Mounts {
			s.wantFile(other, m.Path+"/file", "of "+m.Volume)
		}
	}},
	{"a host path is the host's directory", func(s *suite) {
		s.need("WriteFile", s.w.WriteFile != nil && s.w.ReadFile != nil)
		s.need("HostPath", s.h.HostPath != nil)
		host := s.h.HostPath(s.T)
		spec := s.spec("a", 1)
		spec.Mounts = []runtime.Mount{{Path: "/host", HostPath: host}}
		s.write(s.run(spec), "/host/file", "shared")
		spec = s.spec("b", 1)
		spec.Mounts = []runtime.Mount{{Path: "/mnt", HostPath: host, ReadOnly: true}}
		other := s.run(spec)
		s.wantFile(other, "/mnt/file", "shared")
		if err := s.w.WriteFile(s.T, other, "/mnt/file", "x"); !errors.Is(err, syscall.EROFS) {
			s.Errorf("writing to a read-only host path = %v, want EROFS", err)
		}
	}},
	{"a removed workspace's volumes are kept for the next of its id when asked for", func(s *suite) {
		s.need("WriteFile", s.w.WriteFile != nil && s.w.ReadFile != nil)
		for _, keep := range []bool{true, false} {
			spec := s.spec("a", 1)
			spec.WorkspaceUID = map[bool]string{true: "uid-kept", false: "uid-removed"}[keep]
			spec.Mounts = []runtime.Mount{{Path: "/data", Volume: "data"}}
			in := s.run(spec)
			s.write(in, "/data/file", "data")
			s.remove(in.ID)
			for range 2 { // it can be repeated
				if err := s.r.RemoveWorkspace(s.ctx, "a", spec.WorkspaceUID, keep); err != nil {
					s.Errorf("RemoveWorkspace: %v", err)
				}
			}
			next := spec
			next.WorkspaceUID += "-next"
			in = s.run(next)
			if keep {
				s.wantFile(in, "/data/file", "data")
			} else {
				s.wantNoFile(in, "/data/file")
			}
			s.remove(in.ID)
			if err := s.r.RemoveWorkspace(s.ctx, "a", next.WorkspaceUID, false); err != nil {
				s.Errorf("RemoveWorkspace: %v", err)
			}
		}
	}},
	{"the log outlives instances and goes with the workspace", func(s *suite) {
		s.need("HasLog", s.w.HasLog != nil)
		in := s.run(s.spec("a", 1))
		if !s.w.HasLog(s.T, "a") {
			s.Error("a workspace that runs has no log")
		}
		s.remove(in.ID)
		if !s.w.HasLog(s.T, "a") {
			s.Error("the log went with the instance")
		}
		if err := s.r.RemoveWorkspace(s.ctx, "a", "uid-a", true); err != nil {
			s.Errorf("RemoveWorkspace: %v", err)
		}
		if s.w.HasLog(s.T, "a") {
			s.Error("the log outlives its workspace")
		}
	}},
	{"removing one that never was is no error", func(s *suite) {
		if err := s.r.RemoveWorkspace(s.ctx, "never", "uid-never", false); err != nil {
			s.Errorf("RemoveWorkspace: %v", err)
		}
	}},
}
