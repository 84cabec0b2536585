package runtimetest

import (
	"context"
	"errors"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/workspaced/workspaced/runtime"
)

var imageProperties = []property{
	{"an image has one digest however often it is asked for", func(s *suite) {
		digests := make([]string, 4)
		var wg sync.WaitGroup
		for i := range digests {
			wg.Go(func() {
				var err error
				if digests[i], err = s.r.EnsureImage(s.ctx, s.h.Image); err != nil {
					s.Errorf("EnsureImage: %v", err)
				}
			})
		}
		wg.Wait()
		for _, digest := range digests {
			if digest != digests[0] || !strings.HasPrefix(digest, "sha256:") {
				s.Errorf("digests = %q, want one digest", digests)
			}
		}
	}},
	{"an image that does not exist is IMAGE_NOT_FOUND", func(s *suite) {
		s.need("MissingImage", s.h.MissingImage != "")
		digest, err := s.r.EnsureImage(s.ctx, s.h.MissingImage)
		s.wantReason(err, runtime.ReasonImageNotFound, false)
		if digest != "" {
			s.Errorf("digest = %q beside an error", digest)
		}
	}},
	{"what is no reference is IMAGE_INVALID", func(s *suite) {
		for _, ref := range []string{"", "not a reference"} {
			_, err := s.r.EnsureImage(s.ctx, ref)
			s.wantReason(err, runtime.ReasonImageInvalid, true)
		}
	}},
}

var prepareProperties = []property{
	{"a standby has done nothing until it is started", func(s *suite) {
		spec := s.spec("a", 7)
		spec.Command = s.h.ExitWith(3)
		in := s.prepare(spec)
		want := runtime.Instance{
			ID: in.ID, WorkspaceID: "a", WorkspaceUID: "uid-a", Phase: runtime.PhaseStandby,
			PreparedGeneration: 7, ImageDigest: s.ensure(s.h.Image), PID: in.PID,
		}
		if in.PID == 0 || in.ID == "" {
			s.Errorf("the standby has pid %d and id %q", in.PID, in.ID)
		}
		s.wantSame(want)
		// A command that ends at once has not: it was not executed.
		s.start(in.ID, runtime.Launch{Generation: 7})
		if exit := s.wait(in.ID); exit.Code != 3 {
			s.Errorf("exit = %+v, want code 3", exit)
		}
	}},
	{"preparing leaves the older instance running", func(s *suite) {
		old := s.run(s.spec("a", 1))
		next := s.prepare(s.spec("a", 2))
		s.wantSame(old)
		s.wantPhase(next.ID, runtime.PhaseStandby)
		s.remove(next.ID)
		s.wantSame(old)
	}},
	{"what can't run is found out while preparing, by name, and the older instance runs on", func(s *suite) {
		s.canNotPrepare()
	}},
	{"a launch is refused while preparing exactly when it would be while starting", func(s *suite) {
		var launch runtime.Launch
		bytes := 0
		for i := range 16 {
			kv := "LARGE_" + string(rune('A'+i)) + "=" + strings.Repeat("x", 120<<10)
			launch.Env = append(launch.Env, kv)
			bytes += stringBytes([]string{kv})
		}
		spec := s.spec("a", 1)
		spec.LaunchBytes = bytes
		s.start(s.prepare(spec).ID, launch) // 1.9 MiB
		spec.WorkspaceID, spec.WorkspaceUID = "b", "uid-b"
		launch.Env = append(launch.Env, "LAST="+strings.Repeat("x", maxTotal-bytes-9-len("LAST=")))
		spec.LaunchBytes = maxTotal // and what the image has, and the command
		s.names[[2]string{"b", "uid-b"}] = true
		_, err := s.r.Prepare(s.ctx, spec)
		s.wantReason(err, runtime.ReasonEnvironmentTooLarge, true)
		spec.LaunchBytes = 0 // as one that did not say so
		_, err = s.r.Start(s.ctx, s.prepare(spec).ID, launch)
		s.wantReason(err, runtime.ReasonEnvironmentTooLarge, true)
	}},
	{"a prepare that is cancelled at any time leaves nothing that can run", func(s *suite) {
		s.names[[2]string{"a", "uid-a"}] = true
		for _, after := range []time.Duration{-1, 0, time.Millisecond, 20 * time.Millisecond, 60 * time.Millisecond} {
			ctx, cancel := context.WithTimeout(s.ctx, after)
			in, err := s.r.Prepare(ctx, s.spec("a", 1))
			cancel()
			switch {
			case err == nil:
				s.wantPhase(in.ID, runtime.PhaseStandby)
				s.remove(in.ID)
			case !errors.Is(err, context.DeadlineExceeded):
				s.Errorf("Prepare cancelled after %v: %v, want the context's error in it", after, err)
			}
			s.onlyRemnants()
		}
	}},
}

// onlyRemnants checks that failed prepares left nothing but remnants, and that
// those can be removed.
func (s *suite) onlyRemnants() {
	s.Helper()
	for _, in := range s.list("uid-a") {
		if in.Phase != runtime.PhaseRemnant {
			s.Errorf("after Prepare failed, instance %s is %v, want remnant", in.ID, in.Phase)
		}
		s.remove(in.ID)
	}
	if list := s.list("uid-a"); len(list) != 0 {
		s.Errorf("left after Remove: %+v", list)
	}
}

func (s *suite) canNotPrepare() {
	command := func(argv []string) func(*runtime.Spec) {
		if argv == nil {
			return nil
		}
		return func(spec *runtime.Spec) { spec.Command = argv }
	}
	tests := []struct {
		name      string
		edit      func(*runtime.Spec) // nil: the harness lacks what it needs
		reason    runtime.Reason
		permanent bool
	}{
		{"image that is not present", func(spec *runtime.Spec) { spec.Image = s.h.MissingImage },
			runtime.ReasonImageNotFound, false},
		{"no command", func(spec *runtime.Spec) { spec.Image = s.h.NoCommandImage },
			runtime.ReasonCommandMissing, true},
		{"command that does not exist", command(s.h.NotFound), runtime.ReasonCommandNotFound, true},
		{"command that is not executable", command(s.h.NotExecutable), runtime.ReasonCommandNotExecutable, true},
		{"command for another machine", command(s.h.WrongArchitecture), runtime.ReasonWrongArchitecture, true},
		{"working directory", func(spec *runtime.Spec) { spec.WorkingDir = "/no/such/directory" },
			runtime.ReasonWorkingDir, true},
		{"user", func(spec *runtime.Spec) { spec.User = "nosuchuser" }, runtime.ReasonUserNotFound, true},
		{"group", func(spec *runtime.Spec) { spec.User = "0:nosuchgroup" }, runtime.ReasonUserNotFound, true},
		{"host path", func(spec *runtime.Spec) {
			spec.Mounts = []runtime.Mount{{Path: "/host", HostPath: s.h.MissingHostPath}}
		}, runtime.ReasonVolume, false},
		{"launch that is too large", func(spec *runtime.Spec) { spec.LaunchBytes = maxTotal },
			runtime.ReasonEnvironmentTooLarge, true},
	}
	if s.h.MissingImage == "" {
		tests[0].edit = nil
	}
	if s.h.NoCommandImage == "" {
		tests[1].edit = nil
	} else {
		s.ensure(s.h.NoCommandImage)
	}
	if s.h.MissingHostPath == "" {
		tests[len(tests)-2].edit = nil
	}
	old := s.run(s.spec("old", 1))
	for _, test := range tests {
		if test.edit == nil {
			s.Logf("NOT TESTED: %s: the harness has none", test.name)
			continue
		}
		spec := s.spec("a", 1)
		test.edit(&spec)
		s.names[[2]string{"a", "uid-a"}] = true
		in, err := s.r.Prepare(s.ctx, spec)
		if err == nil {
			s.Errorf("%s: Prepare succeeded, want %s", test.name, test.reason)
			s.remove(in.ID)
			continue
		}
		s.Logf("%s: %v", test.name, err)
		s.wantReason(err, test.reason, test.permanent)
		s.onlyRemnants()
	}
	s.wantSame(old)
}

var startProperties = []property{
	{"the command gets exactly the image's environment with the launch's over it", func(s *suite) {
		s.need("Env", s.w.Env != nil)
		spec := s.spec("a", 1)
		spec.Env = []string{"PLAIN=before", "GONE=yes"} // counts for looking up the command only
		in := s.prepare(spec)
		launch := runtime.Launch{Generation: 1, Env: []string{
			"TWICE=first", "EMPTY=", "EQUALS=a=b=c", "LINES=one\ntwo", "UTF8=grün 漢字",
			"BYTES=\xff\xfe", "PLAIN=now", "TWICE=second",
		}}
		want := []string{
			"EMPTY=", "EQUALS=a=b=c", "LINES=one\ntwo", "UTF8=grün 漢字", "BYTES=\xff\xfe", "PLAIN=now", "TWICE=second",
		}
		if len(s.h.Env) > 0 { // the launch's wins over the image's
			key, _, _ := strings.Cut(s.h.Env[0], "=")
			launch.Env = append(launch.Env, key+"=/launch")
			want = append(want, key+"=/launch")
			want = append(want, s.h.Env[1:]...)
		}
		got := s.w.Env(s.T, s.start(in.ID, launch))
		if d := difference(want, got); d != "" {
			s.Errorf("environment: %s", d)
		}
	}},
	{"an empty launch gives the image's environment", func(s *suite) {
		s.need("Env", s.w.Env != nil)
		if d := difference(s.h.Env, s.w.Env(s.T, s.run(s.spec("a", 1)))); d != "" {
			s.Errorf("environment: %s", d)
		}
	}},
	{"a large environment arrives whole", func(s *suite) {
		s.need("Env", s.w.Env != nil)
		var launch runtime.Launch
		for i := range 20 { // 1.2 MiB: more than any pipe takes at once
			launch.Env = append(launch.Env, "LARGE_"+string(rune('A'+i))+"="+strings.Repeat("x", 60<<10+i))
		}
		want := append(append([]string(nil), s.h.Env...), launch.Env...)
		got := s.w.Env(s.T, s.start(s.prepare(s.spec("a", 1)).ID, launch))
		if d := difference(want, got); d != "" {
			s.Errorf("environment: %s", d)
		}
	}},
	{"generation and secret versions are on record", func(s *suite) {
		in := s.prepare(s.spec("a", 4))
		before := time.Now()
		started := s.start(in.ID, runtime.Launch{Generation: 6, SecretVersions: map[string]int64{"KEY": 3, "OTHER": 1}, GlobalSecrets: []string{"OTHER"}})
		want := in
		want.Phase, want.Generation = runtime.PhaseRunning, 6
		want.SecretVersions, want.GlobalSecrets = map[string]int64{"KEY": 3, "OTHER": 1}, []string{"OTHER"}
		want.StartTime = started.StartTime
		s.wantSame(want)
		s.wantSame(started)
		if started.StartTime.Before(before.Add(-time.Second)) || started.StartTime.After(time.Now().Add(time.Second)) {
			s.Errorf("start time = %v, want it after %v", started.StartTime, before)
		}
	}},
	{"an environment that execve does not take is ENVIRONMENT_TOO_LARGE, and nothing runs", func(s *suite) {
		in := s.prepare(s.spec("a", 1))
		_, err := s.r.Start(s.ctx, in.ID, runtime.Launch{Generation: 1, Env: []string{
			"SMALL=canary-one", "BIG=" + strings.Repeat("canary-two", 15<<10),
		}})
		s.wantReason(err, runtime.ReasonEnvironmentTooLarge, true)
		if err != nil && strings.Contains(err.Error(), "canary") {
			s.Errorf("the error shows a value: %.200v", err)
		}
		s.wantNeverStarts(in.ID)
	}},
	{"a command that execve refuses fails the start, and nothing runs", func(s *suite) {
		s.need("ExecFails", s.h.ExecFails != nil)
		spec := s.spec("a", 1)
		spec.Command = s.h.ExecFails
		in := s.prepare(spec)
		_, err := s.r.Start(s.ctx, in.ID, runtime.Launch{Generation: 1, Env: []string{"SECRET=canary"}})
		var e *runtime.Error
		if !errors.As(err, &e) || e.Reason == "" || !e.Permanent || e.Message == "" {
			s.Errorf("Start = %#v, want a permanent *runtime.Error with a reason", err)
		}
		if err != nil && strings.Contains(err.Error(), "canary") {
			s.Errorf("the error shows a value: %v", err)
		}
		s.wantNeverStarts(in.ID)
	}},
	{"a start that is cancelled at any time runs or never does", func(s *suite) {
		for _, after := range []time.Duration{-1, 500 * time.Microsecond, 3 * time.Millisecond} {
			in := s.prepare(s.spec("a", 1))
			ctx, cancel := context.WithTimeout(s.ctx, after)
			started, err := s.r.Start(ctx, in.ID, runtime.Launch{Generation: 1})
			cancel()
			if err == nil {
				s.wantSame(started)
			} else {
				s.wantNeverStarts(in.ID)
			}
			if err == nil && after < 0 {
				s.Error("Start succeeded in a context that had ended before")
			}
			s.remove(in.ID)
		}
	}},
	{"an instance that is not there is ErrNotFound", func(s *suite) {
		if _, err := s.r.Start(s.ctx, "nosuchinstance", runtime.Launch{}); !errors.Is(err, runtime.ErrNotFound) {
			s.Errorf("Start = %v, want ErrNotFound", err)
		}
	}},
	{"what has ended is not started again", func(s *suite) {
		in := s.run(s.spec("a", 1))
		s.stop(in.ID)
		if _, err := s.r.Start(s.ctx, in.ID, runtime.Launch{Generation: 2}); err == nil {
			s.Error("Start of an exited instance succeeded")
		}
		if got := s.wantPhase(in.ID, runtime.PhaseExited); got.Generation != 1 {
			s.Errorf("generation on record = %d, want 1", got.Generation)
		}
	}},
	{"a standby whose process is gone is not started", func(s *suite) {
		in := s.prepare(s.spec("a", 1))
		if err := s.r.Stop(s.ctx, in.ID, syscall.SIGKILL, 0); err != nil {
			s.Errorf("Stop of a standby: %v", err)
		}
		if _, err := s.r.Start(s.ctx, in.ID, runtime.Launch{Generation: 1}); err == nil {
			s.Error("Start of a standby that had ended succeeded")
		}
		s.wantNeverStarts(in.ID)
	}},
}
