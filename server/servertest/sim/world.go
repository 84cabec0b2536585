package sim

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/runtime/runtimetest/fault"
	"github.com/workspaced/workspaced/server/servertest/internal/daemon"
	"github.com/workspaced/workspaced/store"
)

// world is everything: a daemon that comes and goes, the containers and the disk,
// which stay, and those who use and disturb it. It lives in one bubble of
// testing/synctest.
type world struct {
	plan    *plan
	dir     string
	fake    *runtimetest.Fake
	journal *journal
	faults  *injector
	report  *Report
	start   time.Time
	skew    atomic.Int64 // how far the daemon's clock is ahead of the bubble's
	jumped  atomic.Int64 // how often it has jumped
	seq     atomic.Int64 // orders what happens at the same time
	conns   []*grpc.ClientConn
	apis    []workspacev1.WorkspaceControlClient
	// containers is the way of containers.
	containers workspacev1.WorkspaceControlClient
	killed     chan struct{} // size 1
	orphans    sync.Mutex    // held while one is being made

	// noteEnd is called before a container is made to end by itself.
	noteEnd func(instance string, why ending)
	// onCommit is called after each commit.
	onCommit func([]store.Change)
	// onBoot is called after each boot, before anybody is connected.
	onBoot func(d *daemon.Daemon)
	// onDown is called when nothing of a daemon is left.
	onDown func()

	mu       sync.Mutex
	daemon   *daemon.Daemon // nil while down
	dead     bool           // it was killed
	problems []string
}

// converge is how long it may take until everything is as it should be once the
// last fault has ended: what hangs has a deadline, at most 10 minutes for a pull.
const converge = 20 * time.Minute

// clientsLimit is how long all clients together may take: each call has a
// deadline.
const clientsLimit = 3 * time.Hour

func newWorld(p *plan, dir string, conns int) (*world, error) {
	w := &world{
		plan: p, dir: dir, report: NewReport(), journal: newJournal(), start: time.Now(),
		fake: runtimetest.NewFake(), killed: make(chan struct{}, 1),
	}
	w.report.Seeds = 1
	w.faults = newInjector(w)
	w.addImages()
	for range conns {
		api, err := w.connect((*daemon.Daemon).Dial)
		if err != nil {
			return nil, err
		}
		w.apis = append(w.apis, api)
	}
	var err error
	w.containers, err = w.connect((*daemon.Daemon).DialContainers)
	return w, err
}

func (w *world) connect(dial func(*daemon.Daemon, context.Context) (net.Conn, error)) (workspacev1.WorkspaceControlClient, error) {
	conn, err := grpc.NewClient("passthrough:///workspaced",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			d := w.current()
			if d == nil {
				return nil, errDown
			}
			return dial(d, ctx)
		}),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: time.Millisecond, Multiplier: 2, MaxDelay: 200 * time.Millisecond},
			MinConnectTimeout: time.Second,
		}))
	if err != nil {
		return nil, err
	}
	w.conns = append(w.conns, conn)
	return workspacev1.NewWorkspaceControlClient(conn), nil
}

// watchCalls lets hooks see each call of the runtime right before and after its
// effect: no fault comes in between.
func (w *world) watchCalls(before, after runtimetest.Hook) {
	w.fake.OnCall(w.faults.hook(fault.Before))
	w.fake.OnCall(before)
	w.fake.AfterCall(after)
	w.fake.AfterCall(w.faults.hook(fault.After))
}

func (w *world) api(i int) workspacev1.WorkspaceControlClient {
	return w.apis[i%len(w.apis)]
}

// elapsed is the bubble's time.
func (w *world) elapsed() time.Duration { return time.Since(w.start) }

// now is the daemon's clock.
func (w *world) now() time.Time { return time.Now().Add(time.Duration(w.skew.Load())) }

// tick is a moment: what happens later has a greater one.
func (w *world) tick() int64 { return w.seq.Add(1) }

// problem notes something that must not be.
func (w *world) problem(format string, args ...any) {
	text := strings.ReplaceAll(fmt.Sprintf(format, args...), marker, "") // or the journal has it
	w.journal.add("PROBLEM %s", text)
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.problems) < 20 && !slices.Contains(w.problems, text) {
		w.problems = append(w.problems, text)
	}
}

func (w *world) failure() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.problems) == 0 {
		return nil
	}
	return errors.New(strings.Join(w.problems, "\n"))
}

var errDown = errors.New("connection refused")

// current is the daemon that runs; nil while none does.
func (w *world) current() *daemon.Daemon {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.dead {
		return nil
	}
	return w.daemon
}

// alive reports whether a daemon runs that was not killed.
func (w *world) alive() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.daemon != nil && !w.dead
}

// boot starts a daemon on what is there.
func (w *world) boot() error {
	w.faults.mu.Lock()
	w.faults.panics = 0
	w.faults.mu.Unlock()
	w.mu.Lock() // who kills it at once has to know it
	d, err := daemon.Start(daemon.Config{
		Dir: w.dir, Runtime: w.fake, Logger: w.journal.logger(), Now: w.now, Around: w.faults.around,
		OnCommit: w.onCommit, MaxConcurrentCycles: w.plan.cycles, NoSweep: !w.plan.sweeps,
	})
	w.daemon, w.dead = d, false
	w.mu.Unlock()
	if err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	w.journal.add("booted")
	if w.onBoot != nil {
		w.onBoot(d)
	}
	return nil
}

// kill ends the daemon at once, from wherever it is called. The conductor does
// the rest.
func (w *world) kill() {
	w.mu.Lock()
	d := w.daemon
	if d == nil || w.dead {
		w.mu.Unlock()
		return
	}
	w.dead = true
	w.mu.Unlock()
	w.journal.add("killed")
	d.Kill()
	select {
	case w.killed <- struct{}{}:
	default:
	}
}

// reap waits until nothing is left of a daemon that was killed.
func (w *world) reap() error {
	w.mu.Lock()
	d := w.daemon
	w.mu.Unlock()
	err := d.Wait()
	w.mu.Lock()
	w.daemon = nil
	w.mu.Unlock()
	w.report.Crashes++
	w.gone(d)
	if err != nil {
		return fmt.Errorf("after the kill: %w", err)
	}
	return nil
}

// shutdown ends the daemon in good order. It may be killed meanwhile.
func (w *world) shutdown(patience time.Duration) error {
	w.mu.Lock()
	d := w.daemon
	w.mu.Unlock()
	w.journal.add("shutting down, for %v", patience)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err := d.Shutdown(ctx)
	w.mu.Lock()
	w.daemon, w.dead = nil, false
	w.mu.Unlock()
	select {
	case <-w.killed: // while it shut down
		err = nil
	default:
	}
	w.journal.add("shut down")
	w.report.Shutdowns++
	w.gone(d)
	if err != nil {
		return fmt.Errorf("shutdown: %w", err)
	}
	return nil
}

// gone looks at a daemon of which nothing runs any more.
func (w *world) gone(d *daemon.Daemon) {
	w.faults.mu.Lock()
	panics := w.faults.panics
	w.faults.mu.Unlock()
	if n := d.Supervisor.Panics(); n != int64(panics) {
		w.problem("the supervisor counted %d panics, there were %d", n, panics)
	}
	if w.onDown != nil {
		w.onDown()
	}
}

// event is something that the conductor does to the world.
type event struct {
	at    time.Duration
	name  string
	times int // besides 0, which is once
	every time.Duration
	do    func(w *world) error
}

// conduct lets the events happen in their time, and boots what was killed, until
// the events are over and done is closed.
func (w *world) conduct(events []event, done <-chan struct{}) error {
	limit := time.NewTimer(clientsLimit)
	defer limit.Stop()
	for len(events) > 0 || done != nil {
		var next <-chan time.Time
		if len(events) > 0 {
			next = time.After(events[0].at - w.elapsed())
		}
		select {
		case <-w.killed:
			if err := w.replace(w.plan.downtime(w.report.Crashes)); err != nil {
				return err
			}
		case <-next:
			e := events[0]
			events = events[1:]
			if !w.alive() {
				continue // killed a moment ago: the next turn boots
			}
			w.journal.add("event: %s", e.name)
			if err := e.do(w); err != nil {
				return fmt.Errorf("%s: %w", e.name, err)
			}
		case <-done:
			done = nil
		case <-limit.C:
			return fmt.Errorf("clients have not come to an end after %v", clientsLimit)
		}
	}
	return nil
}

// replace boots another daemon in place of one that was killed.
func (w *world) replace(downtime time.Duration) error {
	if err := w.reap(); err != nil {
		return err
	}
	<-time.After(downtime)
	return w.boot()
}

// calm ends all faults, and lets time pass until everything has come to rest.
func (w *world) calm() error {
	w.faults.heal()
	w.addAbsentImages()
	synctest.Wait()
	select {
	case <-w.killed: // by the last fault
		if err := w.replace(0); err != nil {
			return err
		}
	default:
	}
	w.journal.add("faults have ended")
	pass(converge)
	return nil
}

// pass lets the bubble's time pass, and everything come to rest.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

// end shuts everything down.
func (w *world) end() error {
	var errs []error
	for _, conn := range w.conns {
		errs = append(errs, conn.Close())
	}
	if w.alive() {
		errs = append(errs, w.shutdown(time.Minute))
	} else if w.daemon != nil {
		errs = append(errs, w.reap())
	}
	w.report.Launches = len(w.fake.Launches(""))
	if lines := w.journal.leaks(); len(lines) > 0 {
		w.problem("secrets in the log: %s", strings.Join(lines, ""))
	}
	return errors.Join(errs...)
}

// Images that exist.
const (
	imageBad    = "bad"    // can't be executed, which only shows in Start
	imageAbsent = "absent" // the registry has it once all faults have ended
)

var images = []weighted[string]{{8, "a"}, {8, "b"}, {4, "slow"}, {2, "deaf"}, {2, imageBad}, {1, imageAbsent}}

func (w *world) addImages() {
	entry := func(c runtimetest.Command) runtimetest.Image {
		return runtimetest.Image{Entrypoint: []string{"serve"}, Commands: map[string]runtimetest.Command{"serve": c}}
	}
	w.fake.AddImage("a", runtimetest.Image{Entrypoint: []string{"serve"}, Env: []string{"FROM_IMAGE=1"}})
	w.fake.AddImage("b", runtimetest.Image{Entrypoint: []string{"serve"}})
	w.fake.AddImage("slow", entry(runtimetest.Command{StopDelay: 3 * time.Second}))
	w.fake.AddImage("deaf", entry(runtimetest.Command{StopDelay: -1}))
	w.fake.AddImage(imageBad, entry(runtimetest.ExecFailure))
}

func (w *world) addAbsentImages() {
	w.fake.AddImage(imageAbsent, runtimetest.Image{Entrypoint: []string{"serve"}})
}

// exitOf draws how a container ends.
func exitOf(d dice) runtime.Exit {
	return pick(d,
		runtime.Exit{Known: true},
		runtime.Exit{Known: true, Code: 1},
		runtime.Exit{Known: true, Code: 42},
		runtime.Exit{Known: true, Code: 139, Signal: 11},
		runtime.Exit{Known: true, Code: 137, Signal: 9, OOMKilled: true},
		runtime.Exit{},
	)
}
