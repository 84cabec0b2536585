package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/workspaced/workspaced/server/loop"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
)

// commitCounter counts what the store has committed. It is the store's OnCommit.
type commitCounter struct{ commits, changes atomic.Uint64 }

func (c *commitCounter) OnCommit(changes []store.Change) {
	c.commits.Add(1)
	c.changes.Add(uint64(len(changes)))
}

// metrics reads the figures when it is asked for them, without a look at the
// database. Labels are names that this program gives, never a caller's.
type metrics struct {
	loops      func() []loop.Status
	commits    *commitCounter
	supervisor *workspace.Supervisor
	limited    func() map[string]uint64 // calls, by reason
	refused    func() uint64            // connections
}

var (
	metricBeat     = loopMetric("heartbeat_timestamp_seconds", "Unix time of the loop's last heartbeat; none before the first.")
	metricStale    = loopMetric("stale", "1 if the loop had no heartbeat for too long, else 0.")
	metricRestarts = loopMetric("restarts_total", "How often the loop failed and was started again.")
	metricPanics   = loopMetric("panics_total", "How many of its failures were panics.")
	metricCycles   = metric("cycles_total", "Cycles begun: replacements or starts of a container.")
	metricActors   = metric("panics_total", "Panics recovered in the actors.")
	metricOrphans  = metric("orphans_removed_total", "Containers removed by the sweep because they belonged to no workspace.")
	metricCommits  = metric("store_commits_total", "Transactions committed that changed a workspace; callers that come together share one.")
	metricChanges  = metric("store_changes_total", "Changes of workspaces committed.")
)

var (
	metricLimited = prometheus.NewDesc("workspaced_calls_limited_total", "Calls refused because of their caller's limits, by the reason in the error.", []string{"reason"}, nil)
	metricRefused = metric("connections_refused_total", "Connections closed at once because there were too many.")
)

func loopMetric(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("workspaced_loop_"+name, help, []string{"loop"}, nil)
}

func metric(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("workspaced_"+name, help, nil, nil)
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		metricBeat, metricStale, metricRestarts, metricPanics, metricCycles, metricActors, metricOrphans, metricCommits, metricChanges,
		metricLimited, metricRefused,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	counter := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	for _, l := range m.loops() {
		if !l.LastBeat.IsZero() {
			gauge(metricBeat, float64(l.LastBeat.UnixMilli())/1000, l.Name)
		}
		stale := 0.0
		if l.Stale {
			stale = 1
		}
		gauge(metricStale, stale, l.Name)
		counter(metricRestarts, float64(l.Restarts), l.Name)
		counter(metricPanics, float64(l.Panics), l.Name)
	}
	counter(metricCycles, float64(m.supervisor.Cycles()))
	counter(metricActors, float64(m.supervisor.Panics()))
	counter(metricOrphans, float64(m.supervisor.Orphans()))
	counter(metricCommits, float64(m.commits.commits.Load()))
	counter(metricChanges, float64(m.commits.changes.Load()))
	for reason, n := range m.limited() {
		counter(metricLimited, float64(n), reason)
	}
	counter(metricRefused, float64(m.refused()))
}

// scrapeTimeout bounds a scrape, from the first byte of the request to the last
// of the answer.
const scrapeTimeout = 10 * time.Second

// metricsServer serves the figures to Prometheus on a listener.
type metricsServer struct {
	http     *http.Server
	listener net.Listener
}

func newMetricsServer(m *metrics, l net.Listener, log *slog.Logger) *metricsServer {
	registry := prometheus.NewRegistry()
	registry.MustRegister(m, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	errorLog := slog.NewLogLogger(log.Handler(), slog.LevelWarn)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorLog:            errorLog,
		ErrorHandling:       promhttp.ContinueOnError,
		MaxRequestsInFlight: 4,
	}))
	return &metricsServer{listener: l, http: &http.Server{
		Handler:        mux,
		ReadTimeout:    scrapeTimeout,
		WriteTimeout:   scrapeTimeout,
		IdleTimeout:    2 * time.Minute,
		MaxHeaderBytes: 16 << 10,
		ErrorLog:       errorLog,
	}}
}

// run serves until ctx ends.
func (m *metricsServer) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = m.http.Close() }) // closing twice is fine
	defer stop()
	if err := m.http.Serve(m.listener); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve metrics on %s: %w", m.listener.Addr(), err)
	}
	return nil
}
