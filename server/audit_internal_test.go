package server

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/store"
)

// auditStore is the part of the store that has the audit log.
type auditStore struct {
	Store
	err            error
	written, later []store.AuditEntry
	report         store.AuditReport
}

func (a *auditStore) Audit(_ context.Context, e store.AuditEntry) error {
	a.written = append(a.written, e)
	return a.err
}
func (a *auditStore) InstanceUID() string              { return "instance" }
func (a *auditStore) AuditLater(e store.AuditEntry)    { a.later = append(a.later, e) }
func (a *auditStore) PruneAudit(context.Context) error { return nil }
func (a *auditStore) VerifyAudit(context.Context) (store.AuditReport, error) {
	return a.report, nil
}

// An RPC with side effects that has given the store no entry gets its answer when
// one is written, and none without.
func TestAudit_NoAnswerWithoutEntry(t *testing.T) {
	info := &grpc.UnaryServerInfo{FullMethod: workspacev1.WorkspaceControl_SetSecret_FullMethodName}
	req := &workspacev1.SetSecretRequest{Name: "secrets/A"}
	answer := func(context.Context, any) (any, error) { return &workspacev1.SetSecretResponse{}, nil }
	for _, failed := range []error{nil, store.ErrDiskFull} {
		a := &auditStore{err: failed}
		s := New(Config{Store: a, Logger: slog.New(slog.DiscardHandler)})
		resp, err := s.auditUnary(t.Context(), req, info, answer)
		if len(a.written) != 1 || a.written[0].Code != "OK" || a.written[0].Resource != "secrets/A" || len(a.later) != 0 {
			t.Errorf("written: %+v, later: %+v", a.written, a.later)
		}
		if failed == nil && (resp == nil || err != nil) {
			t.Errorf("got %v, %v", resp, err)
		}
		if failed != nil && (resp != nil || status.Code(err) != codes.ResourceExhausted) {
			t.Errorf("without an entry: %v, %v", resp, err)
		}
	}
}

// Damage is told once by the log, and by GetServerInfo for as long as it is there.
func TestTendAudit(t *testing.T) {
	var log bytes.Buffer
	a := &auditStore{}
	s := New(Config{Store: a, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	for _, step := range []struct {
		problem string
		lines   int
	}{{"", 0}, {"entry 7 is missing", 1}, {"entry 7 is missing", 1}, {"", 2}} {
		a.report = store.AuditReport{Problem: step.problem, Problems: len(step.problem)}
		if err := s.TendAudit(t.Context()); err != nil {
			t.Fatal(err)
		}
		info, err := admin{server: s}.GetServerInfo(t.Context(), nil)
		if err != nil || info.GetAuditLogProblem() != step.problem || (s.AuditIntact() == nil) != (step.problem == "") {
			t.Errorf("%q: %v, %v, %v", step.problem, info, err, s.AuditIntact())
		}
		if n := strings.Count(log.String(), "\n"); n != step.lines {
			t.Errorf("%q: the log has %s", step.problem, log.String())
		}
	}
}
