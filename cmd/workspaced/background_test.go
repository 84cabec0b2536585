package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/google/go-cmp/cmp"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/loop"
)

// The daemon's loops all beat, and health and metrics tell of each.
func TestServeLoops(t *testing.T) {
	in := newInstance(t)
	notify := listenNotify(t, in.path("notify.sock"))
	t.Setenv("WATCHDOG_USEC", "300000")
	metrics := in.path("run/metrics.sock")
	s := in.serve("--metrics-listen="+metrics, "--socket-group=12345", "--audit-copy="+in.path("audit.log"))
	if got := mode(t, metrics); got != 0o660 {
		t.Errorf("the socket of metrics has mode %o", got)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	// value returns a figure; false if there is none.
	value := func(name string) (float64, bool) {
		code, body := get(t, metrics, "/metrics")
		if code != http.StatusOK {
			t.Fatalf("metrics: status %d", code)
		}
		for _, line := range figures(body) {
			if rest, ok := strings.CutPrefix(line, name+" "); ok {
				v, err := strconv.ParseFloat(rest, 64)
				if err != nil {
					t.Fatal(err)
				}
				return v, true
			}
		}
		return 0, false
	}
	eventually := func(what string, ok func() bool) {
		t.Helper()
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for !ok() {
			select {
			case <-tick.C:
			case <-ctx.Done():
				t.Fatalf("in vain: %s\n%s", what, s.log)
			}
		}
	}

	loops := loopNames
	withoutBeat := []string{"hub", "containerd-process", "audit-copy"} // at least not within seconds
	health := healthv1.NewHealthClient(s.conn)
	for _, name := range loops {
		resp, err := health.Check(ctx, &healthv1.HealthCheckRequest{Service: server.LoopService(name)})
		if err != nil || resp.Status != healthv1.HealthCheckResponse_SERVING {
			t.Errorf("health of %s: %v, %v", name, resp, err)
		}
		if slices.Contains(withoutBeat, name) {
			continue
		}
		eventually("a heartbeat of "+name, func() bool {
			beat, ok := value(fmt.Sprintf("workspaced_loop_heartbeat_timestamp_seconds{loop=%q}", name))
			return ok && time.Since(time.Unix(int64(beat), 0)) < time.Minute
		})
	}
	_, body := get(t, metrics, "/metrics")
	var told []string
	for _, m := range regexp.MustCompile(`workspaced_loop_stale\{loop="(.*)"\} 0`).FindAllStringSubmatch(body, -1) {
		told = append(told, m[1])
	}
	slices.Sort(loops)
	if diff := cmp.Diff(loops, told); diff != "" {
		t.Errorf("loops in the metrics, none stale:\n%s", diff)
	}

	// The service manager's watchdog is fed again and again.
	for fed := 0; fed < 3; {
		select {
		case got := <-notify:
			if strings.Contains(got, "WATCHDOG=1") {
				fed++
			}
		case <-ctx.Done():
			t.Fatal("the watchdog is not fed")
		}
	}
	// A containerd that is killed is started again, and that is counted.
	pid := regexp.MustCompile(`private containerd started" pid=(\d+)`).FindStringSubmatch(s.log.String())
	if pid == nil {
		t.Fatalf("no pid of containerd in the log:\n%s", s.log)
	}
	n, err := strconv.Atoi(pid[1])
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(n, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually("the restart is counted", func() bool {
		restarts, _ := value(`workspaced_loop_restarts_total{loop="containerd-process"}`)
		return restarts == 1
	})
	if panics, ok := value(`workspaced_loop_panics_total{loop="containerd-process"}`); !ok || panics != 0 {
		t.Errorf("panics: %v, %v", panics, ok)
	}
	// A refused call is in the copy of the audit log once the daemon has ended, at the
	// latest.
	_, err = workspacev1.NewWorkspaceControlClient(s.conn).RestartWorkspace(ctx, &workspacev1.RestartWorkspaceRequest{Name: "workspaces/none"})
	if status.Code(err) != codes.NotFound {
		t.Error(err)
	}
	_, err = workspacev1.NewAdminControlClient(s.conn).ListAuditEntries(ctx, &workspacev1.ListAuditEntriesRequest{})
	if err != nil {
		t.Error(err)
	}
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	lines := checkAuditLines(t, read(t, in.path("audit.log")), make([]byte, 32))
	if got := mode(t, in.path("audit.log")); len(lines) != 1 || !strings.Contains(lines[0], "RestartWorkspace") || got != 0o600 {
		t.Errorf("the copy of the audit log has mode %o and %q", got, lines)
	}
	if exists(metrics) {
		t.Error("the socket of metrics is still there")
	}
}

// loopNames are the loops of a daemon with a private containerd under a service
// manager with a watchdog.
var loopNames = []string{"hub", "sweep", "logs", "store", "containerd", "containerd-process", "audit", "audit-copy", "tokens", "health", "watchdog"}

// The watchdog is fed while loops fail, but not while one hangs.
func TestFeedWatchdog(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	synctest.Test(t, func(t *testing.T) {
		d := &running{loops: loop.New(slog.New(slog.DiscardHandler))}
		ctx, cancel := context.WithCancel(t.Context())
		release := make(chan struct{})
		d.loops.Every(ctx, "fails", time.Second, time.Second, func(context.Context) error { return errRoot })
		d.loops.Every(ctx, "hangs", time.Second, time.Second, func(context.Context) error {
			<-release
			return nil
		})
		<-time.After(20 * time.Second)
		if err := d.feedWatchdog(ctx); err != nil {
			t.Errorf("after 20 s: %v", err)
		}
		<-time.After(20 * time.Second)
		if err := d.feedWatchdog(ctx); err == nil || !strings.Contains(err.Error(), "the loop hangs hangs") {
			t.Errorf("after 40 s: %v", err)
		}
		close(release)
		synctest.Wait()
		if err := d.feedWatchdog(ctx); err != nil {
			t.Errorf("released: %v", err)
		}
		cancel()
		d.loops.Wait()
	})
}
