package runtimetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/workspaced/workspaced/runtime"
)

// wantExit checks how an instance ended, as Watch and List say.
func (s *suite) wantExit(id string, code, signal int) {
	s.Helper()
	exit := s.wait(id)
	if !exit.Known || exit.Code != code || exit.Signal != signal || exit.OOMKilled {
		s.Errorf("Wait(%s) = %+v, want code %d, signal %d", id, exit, code, signal)
	}
	if age := time.Since(exit.Time); age < -time.Second || age > 2*deadline {
		s.Errorf("exit time = %v, %v ago", exit.Time, age)
	}
	in := s.wantPhase(id, runtime.PhaseExited)
	if in.PID != 0 {
		s.Errorf("exited instance %s has pid %d", id, in.PID)
	}
	if in.Exit == nil || in.Exit.Code != code || in.Exit.Signal != signal || !in.Exit.Known {
		s.Errorf("List says instance %s ended with %+v, want %+v", id, in.Exit, exit)
	}
}

// wantStopped checks whether List says that an instance was told to end.
func (s *suite) wantStopped(id string, want bool) {
	s.Helper()
	if in, ok := s.get(id); !ok || in.Stopped != want {
		s.Errorf("instance %+v: Stopped = %t, want %t", in, in.Stopped, want)
	}
}

var stopProperties = []property{
	{"the command ends on its signal", func(s *suite) {
		in := s.run(s.spec("a", 1))
		begin := time.Now()
		s.stop(in.ID)
		if took := time.Since(begin); took > deadline/3 {
			s.Errorf("Stop took %v: it waited for the grace period", took)
		}
		s.wantPhase(in.ID, runtime.PhaseExited)
		s.wantExit(in.ID, 0, 0)
	}},
	{"a command that ignores the signal is killed after the grace period", func(s *suite) {
		spec := s.spec("a", 1)
		spec.Command = s.h.Ignore
		in := s.run(spec)
		begin := time.Now()
		const grace = 200 * time.Millisecond
		if err := s.r.Stop(s.ctx, in.ID, syscall.SIGTERM, grace); err != nil {
			s.Errorf("Stop: %v", err)
		}
		if took := time.Since(begin); took < grace {
			s.Errorf("Stop took %v, want the grace period of %v at least", took, grace)
		}
		s.wantExit(in.ID, 137, 9)
	}},
	{"a stop that is cancelled in the grace period says so, and can be repeated", func(s *suite) {
		spec := s.spec("a", 1)
		spec.Command = s.h.Ignore
		in := s.run(spec)
		ctx, cancel := context.WithTimeout(s.ctx, 100*time.Millisecond)
		defer cancel()
		begin := time.Now()
		if err := s.r.Stop(ctx, in.ID, syscall.SIGTERM, deadline/2); !errors.Is(err, context.DeadlineExceeded) {
			s.Errorf("Stop = %v, want the context's error", err)
		}
		if took := time.Since(begin); took > deadline/3 {
			s.Errorf("Stop took %v: it waited for the grace period", took)
		}
		s.wantPhase(in.ID, runtime.PhaseRunning)
		if err := s.r.Stop(s.ctx, in.ID, syscall.SIGTERM, 0); err != nil {
			s.Errorf("the second Stop: %v", err)
		}
		s.wantExit(in.ID, 137, 9)
	}},
	{"an instance that has ended is no error", func(s *suite) {
		spec := s.spec("a", 1)
		spec.Command = s.h.ExitWith(5)
		in := s.run(spec)
		s.wantExit(in.ID, 5, 0)
		s.wantStopped(in.ID, false)
		s.stop(in.ID)
		s.wantExit(in.ID, 5, 0) // as before
		s.wantStopped(in.ID, false)
	}},
	{"who was told to end is known by it, also to the next daemon", func(s *suite) {
		stopped := s.run(s.spec("a", 1))
		s.wantStopped(stopped.ID, false)
		// Who waits meanwhile keeps what it finds on the same record.
		var waiting sync.WaitGroup
		ctx, cancel := context.WithTimeout(s.ctx, deadline)
		defer cancel()
		watched := &watchedContext{Context: ctx, used: make(chan struct{})}
		waiting.Go(func() {
			if _, err := Wait(watched, s.r, stopped.ID); err != nil {
				s.Errorf("Wait: %v", err)
			}
		})
		select {
		case <-watched.used:
		case <-ctx.Done():
			s.Fatal("Wait does not look at its context")
		}
		s.stop(stopped.ID)
		waiting.Wait()
		s.wantStopped(stopped.ID, true)

		spec := s.spec("b", 1)
		spec.Command = s.h.ExitWith(0)
		ended := s.run(spec)
		s.wait(ended.ID)
		spec = s.spec("c", 1)
		spec.Command = s.h.Ignore
		told := s.run(spec)
		ctx, cancelStop := context.WithTimeout(s.ctx, 100*time.Millisecond)
		defer cancelStop()
		if err := s.r.Stop(ctx, told.ID, syscall.SIGTERM, deadline/2); !errors.Is(err, context.DeadlineExceeded) {
			s.Errorf("Stop = %v, want the context's error", err)
		}
		running := s.run(s.spec("d", 1))
		standby := s.prepare(s.spec("d", 2))
		if err := s.r.Stop(s.ctx, standby.ID, syscall.SIGTERM, deadline/2); err != nil {
			s.Errorf("Stop of a standby: %v", err)
		}
		check := func() {
			s.Helper()
			for id, want := range map[string]bool{
				stopped.ID: true, ended.ID: false, told.ID: true, running.ID: false, standby.ID: true,
			} {
				s.wantStopped(id, want)
			}
		}
		check()
		s.wantPhase(told.ID, runtime.PhaseRunning)
		s.restart(nil)
		check()
		s.stop(running.ID)
		s.wantStopped(running.ID, true)
	}},
	{"an instance that is not there is ErrNotFound", func(s *suite) {
		if err := s.r.Stop(s.ctx, "nosuchinstance", syscall.SIGTERM, 0); !errors.Is(err, runtime.ErrNotFound) {
			s.Errorf("Stop = %v, want ErrNotFound", err)
		}
	}},
	{"stopping one leaves the standby of the same workspace alone", func(s *suite) {
		old := s.run(s.spec("a", 1))
		next := s.prepare(s.spec("a", 2))
		s.stop(old.ID)
		s.wantPhase(next.ID, runtime.PhaseStandby)
		started := s.start(next.ID, runtime.Launch{Generation: 2})
		s.wantSame(started)
		s.remove(old.ID)
		s.wantSame(started)
	}},
}

var watchProperties = []property{
	{"a command that ends by itself is seen by everyone who waits, with its code", func(s *suite) {
		spec := s.spec("a", 1)
		spec.Command = s.h.ExitWith(42)
		in := s.run(spec)
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(s.ctx, deadline)
				defer cancel()
				if exit, err := Wait(ctx, s.r, in.ID); err != nil || exit.Code != 42 || !exit.Known {
					s.Errorf("Wait = %+v, %v, want code 42", exit, err)
				}
			})
		}
		wg.Wait()
		s.wantExit(in.ID, 42, 0)
	}},
	{"a command that is killed is seen with the signal", func(s *suite) {
		s.need("Signal", s.w.Signal != nil)
		in := s.run(s.spec("a", 1))
		exits := make(chan error, 1)
		go func() {
			ctx, cancel := context.WithTimeout(s.ctx, deadline)
			defer cancel()
			_, err := Wait(ctx, s.r, in.ID)
			exits <- err
		}()
		s.w.Signal(s.T, in, syscall.SIGKILL)
		if err := <-exits; err != nil {
			s.Errorf("Wait: %v", err)
		}
		s.wantExit(in.ID, 137, 9)
	}},
	{"who has stopped to watch hears nothing, and others do", func(s *suite) {
		in := s.run(s.spec("a", 1))
		heard := make(chan runtime.Exit, 2)
		watch := func() (stop func()) {
			stop, err := s.r.Watch(s.ctx, in.ID, func(exit runtime.Exit) { heard <- exit })
			if err != nil {
				s.Fatalf("Watch: %v", err)
			}
			return stop
		}
		stop, stopOther := watch(), watch()
		defer stopOther()
		stop()
		stop() // once more does nothing
		s.stop(in.ID)
		select {
		case <-heard:
		case <-time.After(deadline):
			s.Fatal("the end was not told")
		}
		stopOther()
		if len(heard) != 0 {
			s.Errorf("the end was told twice: %+v", <-heard)
		}
	}},
	{"the context of Watch does not end the watch", func(s *suite) {
		in := s.run(s.spec("a", 1))
		ctx, cancel := context.WithCancel(s.ctx)
		heard := make(chan runtime.Exit, 1)
		stop, err := s.r.Watch(ctx, in.ID, func(exit runtime.Exit) { heard <- exit })
		if err != nil {
			s.Fatalf("Watch: %v", err)
		}
		defer stop()
		cancel()
		s.stop(in.ID)
		select {
		case <-heard:
		case <-time.After(deadline):
			s.Fatal("the end was not told")
		}
	}},
	{"waiting ends with its context, and the instance runs on", func(s *suite) {
		in := s.run(s.spec("a", 1))
		ctx, cancel := context.WithTimeout(s.ctx, 50*time.Millisecond)
		defer cancel()
		if exit, err := Wait(ctx, s.r, in.ID); !errors.Is(err, context.DeadlineExceeded) {
			s.Errorf("Wait = %+v, %v, want the context's error", exit, err)
		}
		s.wantSame(in)
	}},
	{"an instance that is not there is ErrNotFound", func(s *suite) {
		if _, err := Wait(s.ctx, s.r, "nosuchinstance"); !errors.Is(err, runtime.ErrNotFound) {
			s.Errorf("Wait = %v, want ErrNotFound", err)
		}
	}},
}

// watchedContext tells when a call has begun to use it.
type watchedContext struct {
	context.Context
	once sync.Once
	used chan struct{}
}

func (c *watchedContext) Done() <-chan struct{} {
	c.once.Do(func() { close(c.used) })
	return c.Context.Done()
}

var removeProperties = []property{
	{"one that runs is killed, and who waits for it learns", func(s *suite) {
		in := s.run(s.spec("a", 1))
		type answer struct {
			exit runtime.Exit
			err  error
		}
		answers := make(chan answer, 1)
		ctx, cancel := context.WithTimeout(s.ctx, deadline)
		defer cancel()
		watched := &watchedContext{Context: ctx, used: make(chan struct{})}
		go func() {
			exit, err := Wait(watched, s.r, in.ID)
			answers <- answer{exit, err}
		}()
		select {
		case <-watched.used:
		case <-ctx.Done():
			s.Fatal("Wait does not look at its context")
		}
		s.remove(in.ID)
		if a := <-answers; !errors.Is(a.err, runtime.ErrNotFound) && (a.err != nil || a.exit.Signal != 9) {
			s.Errorf("Wait = %+v, %v, want signal 9 or ErrNotFound", a.exit, a.err)
		}
		if list := s.list(""); len(list) != 0 {
			s.Errorf("List after Remove = %+v", list)
		}
	}},
	{"in every phase it leaves nothing, and can be repeated", func(s *suite) {
		standby := s.prepare(s.spec("a", 1))
		running := s.run(s.spec("a", 2))
		exited := s.run(s.spec("b", 3))
		s.stop(exited.ID)
		for _, in := range []runtime.Instance{standby, running, exited} {
			s.remove(in.ID)
			if _, ok := s.get(in.ID); ok {
				s.Errorf("List still has %s", in.ID)
			}
			s.remove(in.ID)
			if _, err := Wait(s.ctx, s.r, in.ID); !errors.Is(err, runtime.ErrNotFound) {
				s.Errorf("Wait of a removed instance = %v, want ErrNotFound", err)
			}
		}
		s.removeAll()
		s.wantNoLeaks()
	}},
	{"one that is not there is no error", func(s *suite) {
		s.remove("nosuchinstance")
	}},
}

var listProperties = []property{
	{"by workspace uid or all, oldest first, each in its phase", func(s *suite) {
		a1 := s.run(s.spec("a", 1))
		s.stop(a1.ID)
		b1 := s.run(s.spec("b", 1))
		a2 := s.run(s.spec("a", 2))
		a3 := s.prepare(s.spec("a", 3))
		tests := []struct {
			uid  string
			want []string
		}{
			{"", []string{a1.ID + " exited", b1.ID + " running", a2.ID + " running", a3.ID + " standby"}},
			{"uid-a", []string{a1.ID + " exited", a2.ID + " running", a3.ID + " standby"}},
			{"uid-b", []string{b1.ID + " running"}},
			{"uid-c", nil},
			{"a", nil}, // an id is no uid
		}
		for _, test := range tests {
			var got []string
			for _, in := range s.list(test.uid) {
				got = append(got, in.ID+" "+in.Phase.String())
			}
			if !slices.Equal(got, test.want) {
				s.Errorf("List(%q) = %q, want %q", test.uid, got, test.want)
			}
		}
	}},
	{"a workspace's uid tells it from an earlier one of the same id", func(s *suite) {
		first := s.spec("a", 1)
		first.WorkspaceUID = "uid-first"
		second := s.spec("a", 1)
		second.WorkspaceUID = "uid-second"
		one, two := s.prepare(first), s.prepare(second)
		if one.ID == two.ID {
			s.Errorf("two instances have the id %s", one.ID)
		}
		for uid, id := range map[string]string{"uid-first": one.ID, "uid-second": two.ID} {
			if list := s.list(uid); len(list) != 1 || list[0].ID != id || list[0].WorkspaceID != "a" {
				s.Errorf("List(%s) = %+v, want instance %s", uid, list, id)
			}
		}
	}},
	{"containers of others are counted, and nothing else is done with them", func(s *suite) {
		s.need("AddForeign", s.w.AddForeign != nil)
		want := func(want map[string]int) {
			s.Helper()
			if got, err := s.r.Foreign(s.ctx); err != nil || !maps.Equal(got, want) {
				s.Errorf("Foreign = %v, %v, want %v", got, err, want)
			}
		}
		s.run(s.spec("a", 1))
		want(nil)
		var removes []func()
		for _, uid := range []string{"one", "other", "", "one"} {
			removes = append(removes, s.w.AddForeign(s.T, uid))
		}
		s.prepare(s.spec("b", 1))
		there := map[string]int{"one": 2, "other": 1, "": 1}
		want(there)
		if list := s.list(""); len(list) != 2 {
			s.Errorf("List has %d instances, want 2: %+v", len(list), list)
		}
		s.removeAll()
		want(there)
		s.restart(nil)
		want(there)
		for _, remove := range removes {
			remove()
		}
		want(nil)
	}},
	{"many workspaces at once do not get in each other's way", func(s *suite) {
		const n = 4
		var wg sync.WaitGroup
		for i := range n {
			id := fmt.Sprintf("w%d", i)
			s.names[[2]string{id, "uid-" + id}] = true
			wg.Go(func() { s.cycle(id) })
		}
		wg.Wait()
		if list := s.list(""); len(list) != n {
			s.Errorf("List has %d instances, want %d: %+v", len(list), n, list)
		}
		for _, in := range s.list("") {
			if in.Phase != runtime.PhaseRunning || in.Generation != 2 {
				s.Errorf("instance %+v, want it to run generation 2", in)
			}
		}
	}},
}

// cycle runs a workspace's first two generations. It is called from other
// goroutines: no Fatal here.
func (s *suite) cycle(id string) {
	var old string
	for generation := range int64(2) {
		in, err := s.r.Prepare(s.ctx, s.spec(id, generation+1))
		if err == nil && old != "" {
			err = s.r.Stop(s.ctx, old, syscall.SIGTERM, deadline/2)
		}
		if err == nil {
			_, err = s.r.Start(s.ctx, in.ID, runtime.Launch{Generation: generation + 1})
		}
		if err == nil && old != "" {
			err = s.r.Remove(s.ctx, old)
		}
		if err != nil {
			s.Errorf("workspace %s, generation %d: %v", id, generation+1, err)
			return
		}
		old = in.ID
	}
}
