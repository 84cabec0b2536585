package runtimetest_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
)

const image = "registry.test/app:1"

func spec(id string, generation int64) runtime.Spec {
	return runtime.Spec{WorkspaceID: id, WorkspaceUID: "uid-" + id, Generation: generation, Image: image}
}

func newFake(t *testing.T) *runtimetest.Fake {
	t.Helper()
	f := runtimetest.NewFake(runtimetest.AllowAnyImage())
	if _, err := f.EnsureImage(t.Context(), image); err != nil {
		t.Fatal(err)
	}
	return f
}

func prepare(t *testing.T, r runtimetest.Runtime, s runtime.Spec) runtime.Instance {
	t.Helper()
	in, err := r.Prepare(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	return in
}

func start(t *testing.T, r runtimetest.Runtime, id string, generation int64, env ...string) runtime.Instance {
	t.Helper()
	in, err := r.Start(t.Context(), id, runtime.Launch{Generation: generation, Env: env})
	if err != nil {
		t.Fatal(err)
	}
	return in
}

// phases returns the phase of each instance, by id.
func phases(f *runtimetest.Fake) map[string]runtime.Phase {
	m := make(map[string]runtime.Phase)
	for _, in := range f.Instances() {
		m[in.ID] = in.Phase
	}
	return m
}

func wantPhases(t *testing.T, f *runtimetest.Fake, want map[string]runtime.Phase) {
	t.Helper()
	if diff := cmp.Diff(want, phases(f)); diff != "" {
		t.Errorf("phases (-want +got):\n%s", diff)
	}
}

func TestFakeHoldKeepsACallFromItsEffectUntilReleased(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		g := f.Hold(runtimetest.Prepare, "a")
		done := make(chan error, 2)
		for range 2 {
			go func() { _, err := f.Prepare(t.Context(), spec("a", 1)); done <- err }()
		}
		prepare(t, f, spec("b", 1)) // another workspace passes
		if err := g.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got := g.Held(); got != 2 {
			t.Errorf("held = %d, want 2", got)
		}
		wantPhases(t, f, map[string]runtime.Phase{"b-1": runtime.PhaseStandby})
		if !g.Step() {
			t.Error("Step = false with two calls held")
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		wantPhases(t, f, map[string]runtime.Phase{"b-1": runtime.PhaseStandby, "a-1": runtime.PhaseStandby})
		g.Release()
		if err := <-done; err != nil {
			t.Error(err)
		}
		prepare(t, f, spec("a", 1)) // is not held any more
		if got := f.Count(runtimetest.Prepare, "a"); got != 3 {
			t.Errorf("Count = %d, want 3", got)
		}
	})
}

func TestFakeGateWaitEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newFake(t).Hold(runtimetest.Stop, "")
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := g.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Wait = %v, want the context's error", err)
		}
	})
}

func TestFakeFailFailsSoManyCallsWithoutEffect(t *testing.T) {
	f := newFake(t)
	want := errors.New("no")
	f.Fail(runtimetest.Prepare, "a", want, 2)
	for range 2 {
		if _, err := f.Prepare(t.Context(), spec("a", 1)); !errors.Is(err, want) {
			t.Errorf("Prepare = %v, want %v", err, want)
		}
	}
	if in := f.Instances(); len(in) != 0 {
		t.Errorf("a failed Prepare left %v", in)
	}
	prepare(t, f, spec("a", 1))

	heal := f.Fail(runtimetest.EnsureImage, image, want, 0)
	for range 3 {
		if _, err := f.EnsureImage(t.Context(), image); !errors.Is(err, want) {
			t.Errorf("EnsureImage = %v, want %v", err, want)
		}
	}
	heal()
	if _, err := f.EnsureImage(t.Context(), image); err != nil {
		t.Errorf("EnsureImage after heal = %v", err)
	}
}

// Whatever makes a Start fail, the instance must never start later.
func TestFakeStartThatFailedNeverStartsLater(t *testing.T) {
	f := newFake(t)
	f.Fail(runtimetest.Start, "a-1", errors.New("no"), 1)
	f.FailAfter(runtimetest.Start, "a-2", errors.New("lost"), 1)
	for _, want := range []struct {
		id    string
		phase runtime.Phase
	}{{"a-1", runtime.PhaseRemnant}, {"a-2", runtime.PhaseExited}} {
		in := prepare(t, f, spec("a", 1))
		if _, err := f.Start(t.Context(), in.ID, runtime.Launch{Generation: 1}); err == nil {
			t.Fatal("Start succeeded")
		}
		if got := phases(f)[want.id]; got != want.phase {
			t.Errorf("%s is %v, want %v", want.id, got, want.phase)
		}
		if v := f.Violations(); len(v) != 0 {
			t.Errorf("violations: %v", v)
		}
	}
	if _, err := f.Start(t.Context(), "a-1", runtime.Launch{Generation: 1}); err == nil {
		t.Error("a remnant was started")
	}
	if v := f.Violations(); len(v) != 1 || !strings.Contains(v[0], "a-1") {
		t.Errorf("violations = %q, want the start of a remnant", v)
	}
}

func TestFakePrepareWhoseAnswerIsLostLeavesARemnant(t *testing.T) {
	f := newFake(t)
	f.FailAfter(runtimetest.Prepare, "a", errors.New("lost"), 1)
	if _, err := f.Prepare(t.Context(), spec("a", 1)); err == nil {
		t.Fatal("Prepare succeeded")
	}
	wantPhases(t, f, map[string]runtime.Phase{"a-1": runtime.PhaseRemnant})
}

func TestFakeHookThatPanicsLeavesTheFakeUsable(t *testing.T) {
	f := newFake(t)
	remove := f.OnCall(func(_ context.Context, c runtimetest.Call) error {
		if c.Method == runtimetest.Prepare {
			panic("prepare")
		}
		return nil
	})
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the hook's panic was swallowed")
			}
		}()
		_, _ = f.Prepare(t.Context(), spec("a", 1))
	}()
	remove()
	prepare(t, f, spec("a", 1))
	calls := f.Calls()
	if last := calls[len(calls)-1]; !last.Done || last.Err != nil || last.InstanceID != "a-1" {
		t.Errorf("last call = %+v", last)
	}
}

func TestFakeCrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		old := f.Daemon()
		running := prepare(t, old, spec("a", 1))
		start(t, old, running.ID, 1)
		prepare(t, old, spec("a", 2))

		// In flight: one before its effect, one after it.
		before := f.Hold(runtimetest.Prepare, "b")
		after := f.HoldAfter(runtimetest.Start, "c")
		c := prepare(t, old, spec("c", 3))
		errs := make(chan error, 2)
		go func() { _, err := old.Prepare(t.Context(), spec("b", 1)); errs <- err }()
		go func() { _, err := old.Start(t.Context(), c.ID, runtime.Launch{Generation: 4}); errs <- err }()
		if _, err := old.Watch(t.Context(), running.ID, func(runtime.Exit) { t.Error("the dead daemon hears of an end") }); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if before.Held() != 1 || after.Held() != 1 {
			t.Fatalf("held: %d, %d", before.Held(), after.Held())
		}

		f.Crash()
		for range 2 {
			var e *runtime.Error
			if err := <-errs; !errors.As(err, &e) || e.Reason != runtime.ReasonRuntimeUnavailable {
				t.Errorf("a call that was in flight returned %v", err)
			}
		}
		before.Release()
		after.Release()
		want := map[string]runtime.Phase{
			"a-1": runtime.PhaseRunning, "a-2": runtime.PhaseRemnant, "c-1": runtime.PhaseRunning,
		}
		wantPhases(t, f, want)
		if in, _ := f.Running("uid-c"); in.Generation != 4 {
			t.Errorf("generation on record = %d, want 4", in.Generation)
		}

		// The old daemon is dead for good, the new one finds the world.
		if err := old.Remove(t.Context(), running.ID); err == nil {
			t.Error("the dead daemon removed an instance")
		}
		wantPhases(t, f, want)
		if err := f.Remove(t.Context(), running.ID); err != nil {
			t.Error(err)
		}
		if v := f.Violations(); len(v) != 0 {
			t.Errorf("violations: %q", v)
		}
	})
}

func TestFakeViolations(t *testing.T) {
	tests := []struct {
		name string
		do   func(t *testing.T, f *runtimetest.Fake)
		want string // "": none
	}{
		{"a restart in the right order", func(t *testing.T, f *runtimetest.Fake) {
			start(t, f, prepare(t, f, spec("a", 1)).ID, 1)
			next := prepare(t, f, spec("a", 2))
			if err := f.Stop(t.Context(), "a-1", syscall.SIGTERM, time.Second); err != nil {
				t.Fatal(err)
			}
			start(t, f, next.ID, 2)
			if err := f.Remove(t.Context(), "a-1"); err != nil {
				t.Fatal(err)
			}
		}, ""},
		{"a start of a standby that has died", func(t *testing.T, f *runtimetest.Fake) {
			in := prepare(t, f, spec("a", 1))
			f.Exit(in.ID, runtime.Exit{Code: 1})
			_, err := f.Start(t.Context(), in.ID, runtime.Launch{})
			var e *runtime.Error
			if !errors.As(err, &e) || e.Reason != runtime.ReasonStartInterrupted {
				t.Errorf("Start = %v", err)
			}
		}, ""},
		{"two run", func(t *testing.T, f *runtimetest.Fake) {
			start(t, f, prepare(t, f, spec("a", 1)).ID, 1)
			start(t, f, prepare(t, f, spec("a", 2)).ID, 2)
		}, "Start of instance a-2 while a-1 runs"},
		{"a second start", func(t *testing.T, f *runtimetest.Fake) {
			start(t, f, prepare(t, f, spec("a", 1)).ID, 1)
			_, _ = f.Start(t.Context(), "a-1", runtime.Launch{})
		}, "Start of instance a-1, which is running"},
		{"a remnant of a crash", func(t *testing.T, f *runtimetest.Fake) {
			prepare(t, f, spec("a", 1))
			f.Crash()
			_, _ = f.Start(t.Context(), "a-1", runtime.Launch{})
		}, "Start of instance a-1, which is remnant"},
		{"an instance that is gone", func(t *testing.T, f *runtimetest.Fake) {
			prepare(t, f, spec("a", 1))
			_ = f.Remove(t.Context(), "a-1")
			_, _ = f.Start(t.Context(), "a-1", runtime.Launch{})
		}, "Start of instance a-1, which does not exist"},
		{"a workspace that is gone", func(t *testing.T, f *runtimetest.Fake) {
			_ = f.RemoveWorkspace(t.Context(), "a", "uid-a", false)
			prepare(t, f, spec("a", 1))
		}, "Prepare for workspace a"},
		{"a workspace that has instances is removed", func(t *testing.T, f *runtimetest.Fake) {
			prepare(t, f, spec("a", 1))
			_ = f.RemoveWorkspace(t.Context(), "a", "uid-a", false)
		}, "RemoveWorkspace of a (uid uid-a) while it has instance a-1"},
		{"two calls at once", func(t *testing.T, f *runtimetest.Fake) {
			prepare(t, f, spec("a", 1))
			g := f.Hold(runtimetest.Stop, "a")
			done := make(chan struct{})
			go func() { defer close(done); _ = f.Stop(t.Context(), "a-1", syscall.SIGTERM, 0) }()
			if err := g.Wait(t.Context()); err != nil {
				t.Fatal(err)
			}
			_ = f.Remove(t.Context(), "a-1")
			g.Release()
			<-done
		}, "Stop and Remove of instance a-1 at once"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			f := newFake(t)
			test.do(t, f)
			got := f.Violations()
			if test.want == "" && len(got) != 0 || test.want != "" && (len(got) != 1 || !strings.HasPrefix(got[0], test.want)) {
				t.Errorf("violations = %q, want %q", got, test.want)
			}
		})
	}
}

func TestFakeStopTakesAsLongAsTheCommandOrTheGrace(t *testing.T) {
	tests := []struct {
		name         string
		delay, grace time.Duration
		took         time.Duration
		code         int
	}{
		{"at once", 0, time.Minute, 0, 0},
		{"in a while", 2 * time.Second, time.Minute, 2 * time.Second, 0},
		{"too slow", 2 * time.Minute, time.Minute, time.Minute, 137},
		{"never", -1, time.Minute, time.Minute, 137},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				f.AddImage("slow", runtimetest.Image{
					Entrypoint: []string{"/cmd"},
					Commands:   map[string]runtimetest.Command{"/cmd": {StopDelay: test.delay}},
				})
				if _, err := f.EnsureImage(t.Context(), "slow"); err != nil {
					t.Fatal(err)
				}
				s := spec("a", 1)
				s.Image = "slow"
				in := prepare(t, f, s)
				start(t, f, in.ID, 1)
				begin := time.Now()
				if err := f.Stop(t.Context(), in.ID, syscall.SIGTERM, test.grace); err != nil {
					t.Fatal(err)
				}
				if took := time.Since(begin); took != test.took {
					t.Errorf("Stop took %v, want %v", took, test.took)
				}
				exit, err := runtimetest.Wait(t.Context(), f, in.ID)
				if err != nil || exit.Code != test.code || !exit.Known {
					t.Errorf("Wait = %+v, %v, want code %d", exit, err, test.code)
				}
			})
		})
	}
}

func TestFakeRemoveEndsWhatIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		in := start(t, f, prepare(t, f, spec("a", 1)).ID, 1)
		exits := make(chan runtime.Exit, 1)
		go func() {
			exit, err := runtimetest.Wait(t.Context(), f, in.ID)
			if err != nil {
				t.Error(err)
			}
			exits <- exit
		}()
		synctest.Wait()
		if err := f.Remove(t.Context(), in.ID); err != nil {
			t.Fatal(err)
		}
		if exit := <-exits; exit.Signal != int(syscall.SIGKILL) || !exit.Known || exit.Time.IsZero() {
			t.Errorf("exit = %+v, want it killed", exit)
		}
		if _, running := f.Running("a"); running {
			t.Error("a removed instance runs")
		}
	})
}

func TestFakeImagesAndTheirUsersDirectoriesAndHostPaths(t *testing.T) {
	f := runtimetest.NewFake()
	var e *runtime.Error
	if _, err := f.EnsureImage(t.Context(), image); !errors.As(err, &e) || e.Reason != runtime.ReasonImageNotFound {
		t.Errorf("EnsureImage of an image that was not added = %v", err)
	}
	f.AddImage(image, runtimetest.Image{Digest: "sha256:one", Entrypoint: []string{"/cmd"}})
	for range 2 {
		if digest, err := f.EnsureImage(t.Context(), image); err != nil || digest != "sha256:one" {
			t.Errorf("EnsureImage = %q, %v", digest, err)
		}
		f.RemoveImage(image) // what was pulled stays
	}
	s := spec("a", 1)
	s.Mounts = []runtime.Mount{{Path: "/data", HostPath: "/host"}}
	f.SetHostPathMissing("/host", true)
	if _, err := f.Prepare(t.Context(), s); !errors.As(err, &e) || e.Reason != runtime.ReasonVolume {
		t.Errorf("Prepare with a missing host path = %v", err)
	}
	f.SetHostPathMissing("/host", false)
	in := prepare(t, f, s)
	if f.Exit("nobody", runtime.Exit{}) {
		t.Error("Exit of an instance that does not exist = true")
	}
	start(t, f, in.ID, 1)
	if !f.Exit(in.ID, runtime.Exit{Code: 1, Known: true}) || f.Exit(in.ID, runtime.Exit{Code: 2}) {
		t.Error("an instance ends once")
	}
	if got := f.Instances()[0].Exit; got == nil || got.Code != 1 {
		t.Errorf("exit = %+v, want code 1", got)
	}
}

func TestFakeLaunchesTellWhatWasStartedWithWhat(t *testing.T) {
	f := newFake(t)
	f.AddImage("env", runtimetest.Image{Env: []string{"A=image", "B=image"}, Entrypoint: []string{"/cmd"}, Cmd: []string{"x"}})
	if _, err := f.EnsureImage(t.Context(), "env"); err != nil {
		t.Fatal(err)
	}
	s := spec("a", 1)
	s.Image = "env"
	in := prepare(t, f, s)
	if env := f.Env(in.ID); env != nil {
		t.Errorf("a standby has environment %v", env)
	}
	start(t, f, in.ID, 3, "B=1", "C=1", "B=2")
	if err := f.Remove(t.Context(), in.ID); err != nil {
		t.Fatal(err)
	}
	want := []string{"A=image", "B=2", "C=1"}
	if got := f.Env(in.ID); !slices.Equal(got, want) {
		t.Errorf("Env = %v, want %v", got, want)
	}
	launches := f.Launches("a")
	if len(launches) != 1 || launches[0].Instance.Generation != 3 || launches[0].Spec.Generation != 1 ||
		!slices.Equal(launches[0].Argv, []string{"/cmd", "x"}) {
		t.Errorf("Launches = %+v", launches)
	}
	if got := f.Launches("b"); len(got) != 0 {
		t.Errorf("Launches of another workspace = %v", got)
	}
}

func TestFakeCommandsThatEndByThemselves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := runtimetest.NewFake()
		f.AddImage(image, runtimetest.Image{Commands: map[string]runtimetest.Command{
			"/now":   {Exit: &runtime.Exit{Code: 3, Known: true}},
			"/later": {Exit: &runtime.Exit{Code: 4, Known: true}, Lifetime: time.Hour},
		}})
		if _, err := f.EnsureImage(t.Context(), image); err != nil {
			t.Fatal(err)
		}
		for _, test := range []struct {
			command string
			code    int
			after   time.Duration
		}{{"/now", 3, 0}, {"/later", 4, time.Hour}} {
			s := spec("a", 1)
			s.Command = []string{test.command}
			in := prepare(t, f, s)
			if in = start(t, f, in.ID, 1); in.Phase != runtime.PhaseRunning {
				t.Errorf("Start returned %v", in.Phase)
			}
			exit, err := runtimetest.Wait(t.Context(), f, in.ID)
			if err != nil || exit.Code != test.code || time.Since(in.StartTime) != test.after {
				t.Errorf("%s: Wait = %+v, %v after %v", test.command, exit, err, time.Since(in.StartTime))
			}
		}
		if v := f.Violations(); len(v) != 0 {
			t.Errorf("violations: %q", v)
		}
	})
}

func TestFailAsking(t *testing.T) {
	f, ctx := newFake(t), t.Context()
	for _, id := range []string{"a", "b"} {
		if _, err := f.Prepare(ctx, spec(id, 1)); err != nil {
			t.Fatal(err)
		}
	}
	unasked := errors.New("unasked")
	heal := f.FailAsking("a-1", unasked)
	for uid, want := range map[string][]runtime.Phase{
		"":      {runtime.PhaseUnknown, runtime.PhaseStandby},
		"uid-a": {runtime.PhaseUnknown},
		"uid-b": {runtime.PhaseStandby},
	} {
		list, err := f.List(ctx, uid)
		var got []runtime.Phase
		for _, in := range list {
			got = append(got, in.Phase)
		}
		if d := cmp.Diff(want, got); d != "" || errors.Is(err, unasked) != (want[0] == runtime.PhaseUnknown) {
			t.Errorf("List(%q): %v, %s", uid, err, d)
		}
	}
	heal()
	if list, err := f.List(ctx, ""); err != nil || len(list) != 2 || list[0].Phase != runtime.PhaseStandby {
		t.Errorf("healed: %+v, %v", list, err)
	}
}
