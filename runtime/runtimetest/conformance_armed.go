package runtimetest

import (
	"errors"
	"strings"
	"syscall"
	"time"

	"github.com/workspaced/workspaced/runtime"
)

func (s *suite) arm(id string, launch runtime.Launch) {
	s.Helper()
	if err := s.r.Arm(s.ctx, id, launch); err != nil {
		s.Fatalf("Arm(%s): %v", id, err)
	}
}

var armProperties = []property{
	{"the launch is Start's, whatever it was armed with", func(s *suite) {
		launch := func(generation int64, secret string, version int64) runtime.Launch {
			return runtime.Launch{
				Generation: generation, Env: []string{"SECRET=" + secret}, Files: someFiles(secret),
				SecretVersions: map[string]int64{"SECRET": version}, GlobalSecrets: []string{"SECRET"},
			}
		}
		want := launch(2, "two", 2)
		more, global := want, want
		more.Env = []string{"SECRET=two", "MORE=x"}
		global.GlobalSecrets = nil
		for name, armed := range map[string][]runtime.Launch{
			"itself":               {want},
			"itself twice":         {want, want},
			"another and itself":   {launch(1, "one", 1), want},
			"itself and another":   {want, launch(1, "one", 1)},
			"another":              {launch(1, "one", 1)},
			"an older generation":  {launch(1, "two", 2)},
			"an older version":     {launch(2, "two", 1)},
			"another value":        {launch(2, "one", 2)},
			"a further variable":   {more},
			"a secret of its own":  {global},
			"nothing":              {{}},
			"what can't be itself": {want, {Env: []string{"no variable"}}},
		} {
			in := s.prepare(s.spec("a", 1))
			for _, l := range armed {
				if err := s.r.Arm(s.ctx, in.ID, l); err != nil && len(l.Env) > 0 && strings.Contains(l.Env[0], "=") {
					s.Fatalf("%s: Arm: %v", name, err)
				}
			}
			if got := s.wantPhase(in.ID, runtime.PhaseStandby); got.Generation != 0 || !got.StartTime.IsZero() {
				s.Errorf("%s: once armed it is said to run generation %d since %v", name, got.Generation, got.StartTime)
			}
			before := time.Now()
			started := s.start(in.ID, want)
			s.wantSame(started)
			if started.Generation != 2 || started.SecretVersions["SECRET"] != 2 || len(started.GlobalSecrets) != 1 || started.StartTime.Before(before.Add(-time.Second)) {
				s.Errorf("%s: started as %+v", name, started)
			}
			if s.w.Env != nil {
				if d := difference(append([]string{"SECRET=two"}, s.h.Env...), s.w.Env(s.T, started)); d != "" {
					s.Errorf("%s: environment: %s", name, d)
				}
			}
			s.wantFiles(started, map[string]string{"A": "two", "B": "two", "C": "two"})
			s.restart(nil)
			s.wantSame(started)
			s.remove(in.ID)
		}
	}},
	{"what can't be a launch is refused, and the standby waits on", func(s *suite) {
		in := s.prepare(s.spec("a", 1))
		err := s.r.Arm(s.ctx, in.ID, runtime.Launch{Generation: 1, Env: []string{"BIG=" + strings.Repeat("canary", 30<<10)}})
		s.wantReason(err, runtime.ReasonEnvironmentTooLarge, true)
		if err != nil && strings.Contains(err.Error(), "canary") {
			s.Errorf("the error shows a value: %.200v", err)
		}
		if err := s.r.Arm(s.ctx, in.ID, runtime.Launch{Generation: 1, Files: []runtime.File{{Name: "a/b"}}}); err == nil {
			s.Error("a file a/b was taken")
		}
		s.wantPhase(in.ID, runtime.PhaseStandby)
		s.wantSame(s.start(in.ID, runtime.Launch{Generation: 1}))
	}},
	{"an older instance goes on", func(s *suite) {
		old := s.run(s.spec("a", 1))
		in := s.prepare(s.spec("a", 2))
		launch := runtime.Launch{Generation: 2, Env: []string{"X=1"}}
		s.arm(in.ID, launch)
		s.wantSame(old)
		s.stop(old.ID)
		s.wantSame(s.start(in.ID, launch))
	}},
	{"only a standby of this process is armed", func(s *suite) {
		if err := s.r.Arm(s.ctx, "nosuchinstance", runtime.Launch{}); !errors.Is(err, runtime.ErrNotFound) {
			s.Errorf("Arm of none = %v, want ErrNotFound", err)
		}
		running := s.run(s.spec("a", 1))
		if err := s.r.Arm(s.ctx, running.ID, runtime.Launch{Generation: 2}); err == nil {
			s.Error("a running instance was armed")
		}
		s.wantSame(running)
		ended := s.prepare(s.spec("b", 1))
		s.arm(ended.ID, runtime.Launch{Generation: 1})
		if err := s.r.Stop(s.ctx, ended.ID, syscall.SIGKILL, 0); err != nil {
			s.Errorf("Stop of a standby: %v", err)
		}
		s.wantReason(s.r.Arm(s.ctx, ended.ID, runtime.Launch{Generation: 1}), runtime.ReasonStartInterrupted, false)
		if _, err := s.r.Start(s.ctx, ended.ID, runtime.Launch{Generation: 1}); err == nil {
			s.Error("an armed standby that had ended was started")
		}
		s.wantNeverStarts(ended.ID)
	}},
	{"an armed standby does not outlive its daemon", func(s *suite) {
		in := s.prepare(s.spec("a", 1))
		launch := runtime.Launch{Generation: 1}
		s.arm(in.ID, launch)
		s.restart(nil)
		if _, err := s.r.Start(s.ctx, in.ID, launch); err == nil {
			s.Error("the next daemon started it")
		}
		s.wantNeverStarts(in.ID)
	}},
}
