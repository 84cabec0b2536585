package server_test

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

type (
	listAudit  = workspacev1.ListAuditEntriesRequest
	auditEntry = workspacev1.AuditEntry
)

// audit returns the entries that meet the request, from all pages, and checks that
// the log is whole.
func (h *harness) audit(req *listAudit) []*auditEntry {
	h.t.Helper()
	var entries []*auditEntry
	for {
		page := must2(h.Admin.ListAuditEntries(h.ctx(), req))(h.t)
		entries = append(entries, page.GetAuditEntries()...)
		if req.PageToken = page.GetNextPageToken(); req.PageToken == "" {
			break
		}
	}
	if v := must2(h.Admin.VerifyAuditLog(h.ctx(), &workspacev1.VerifyAuditLogRequest{}))(h.t); !v.GetIntact() {
		h.t.Errorf("the log is not whole: %v", v)
	}
	return entries
}

// newest are the entries that came since the given ones.
func (h *harness) since(before []*auditEntry) []*auditEntry {
	h.t.Helper()
	return h.audit(&listAudit{})[len(before):]
}

// brief says of an entry what the tests compare.
func brief(entries []*auditEntry) []string {
	var all []string
	for _, e := range entries {
		effect := strings.TrimPrefix(e.GetEffect().String(), "AUDIT_EFFECT_")
		all = append(all, fmt.Sprintf("%s %s %s %s gen %d x%d", e.GetMethod()[strings.LastIndex(e.GetMethod(), "/")+1:], tokenName.ReplaceAllString(e.GetResource(), "tokens/ID"), e.GetCode(), effect, e.GetGeneration(), e.GetCount()))
	}
	return all
}

// auditedCalls are a call of each RPC that has side effects, which succeeds, in an
// order in which all do, and what the log has of it.
var auditedCalls = []struct {
	rpc  string
	call func(h *harness) error
	want string
}{
	{"CreateWorkspace", func(h *harness) error {
		_, err := h.Client.CreateWorkspace(h.ctx(), &createReq{
			WorkspaceId: "w", Workspace: &ws{Spec: &workspacev1.WorkspaceSpec{Image: image, WorkspaceApi: true}}, Secrets: []*secret{text("A", "x"), text("B", "y")},
		})
		return err
	}, "CreateWorkspace workspaces/w OK CHANGED gen 1 x1"},
	{"UpdateWorkspace", func(h *harness) error {
		return update(&ws{Name: "workspaces/w", Model: "m"}, "model")(h.Client, h.ctx())
	}, "UpdateWorkspace workspaces/w OK CHANGED gen 2 x1"},
	{"SetModel", func(h *harness) error {
		_, err := h.Client.SetModel(h.ctx(), &workspacev1.SetModelRequest{Name: "workspaces/w", Model: "n"})
		return err
	}, "SetModel workspaces/w OK CHANGED gen 3 x1"},
	{"SetSecret", func(h *harness) error {
		_, err := h.Client.SetSecret(h.ctx(), &workspacev1.SetSecretRequest{Name: "workspaces/w/secrets/A", Payload: &workspacev1.SetSecretRequest_Text{Text: "z"}})
		return err
	}, "SetSecret workspaces/w/secrets/A OK CHANGED gen 4 x1"},
	{"DisableSecretVersion", func(h *harness) error {
		_, err := h.Client.DisableSecretVersion(h.ctx(), &workspacev1.DisableSecretVersionRequest{Name: "workspaces/w/secrets/A/versions/1"})
		return err
	}, "DisableSecretVersion workspaces/w/secrets/A/versions/1 OK CHANGED gen 4 x1"},
	{"EnableSecretVersion", func(h *harness) error {
		_, err := h.Client.EnableSecretVersion(h.ctx(), &workspacev1.EnableSecretVersionRequest{Name: "workspaces/w/secrets/A/versions/1"})
		return err
	}, "EnableSecretVersion workspaces/w/secrets/A/versions/1 OK CHANGED gen 4 x1"},
	{"RollBackSecret", func(h *harness) error {
		_, err := h.Client.RollBackSecret(h.ctx(), &workspacev1.RollBackSecretRequest{Name: "workspaces/w/secrets/A", Version: 1})
		return err
	}, "RollBackSecret workspaces/w/secrets/A OK CHANGED gen 5 x1"},
	{"DestroySecretVersion", func(h *harness) error {
		_, err := h.Client.DestroySecretVersion(h.ctx(), &workspacev1.DestroySecretVersionRequest{Name: "workspaces/w/secrets/A/versions/2"})
		return err
	}, "DestroySecretVersion workspaces/w/secrets/A/versions/2 OK CHANGED gen 5 x1"},
	{"DeleteSecret", func(h *harness) error {
		_, err := h.Client.DeleteSecret(h.ctx(), &workspacev1.DeleteSecretRequest{Name: "workspaces/w/secrets/A"})
		return err
	}, "DeleteSecret workspaces/w/secrets/A OK CHANGED gen 6 x1"},
	{"BatchUpdateSecrets", func(h *harness) error {
		return batch(&workspacev1.BatchUpdateSecretsRequest{Parent: "global", Secrets: []*secret{text("G", "1")}})(h.Client, h.ctx())
	}, "BatchUpdateSecrets global OK CHANGED gen 0 x1"},
	{"RestartWorkspace", func(h *harness) error {
		_, err := h.Client.RestartWorkspace(h.ctx(), &workspacev1.RestartWorkspaceRequest{Name: "workspaces/w"})
		return err
	}, "RestartWorkspace workspaces/w OK CHANGED gen 8 x1"},
	{"StopWorkspace", func(h *harness) error {
		_, err := h.Client.StopWorkspace(h.ctx(), &workspacev1.StopWorkspaceRequest{Name: "workspaces/w"})
		return err
	}, "StopWorkspace workspaces/w OK CHANGED gen 8 x1"},
	{"StartWorkspace", func(h *harness) error {
		_, err := h.Client.StartWorkspace(h.ctx(), &workspacev1.StartWorkspaceRequest{Name: "workspaces/w"})
		return err
	}, "StartWorkspace workspaces/w OK CHANGED gen 9 x1"},
	{"FetchSecrets", func(h *harness) error {
		synctest.Wait()
		_, err := h.asContainer(h.containerToken("w")).FetchSecrets(h.ctx(), fetchReq("w"))
		return err
	}, "FetchSecrets workspaces/w OK UNSPECIFIED gen 0 x1"},
	{"DeleteWorkspace", func(h *harness) error {
		_, err := h.Client.DeleteWorkspace(h.ctx(), &workspacev1.DeleteWorkspaceRequest{Name: "workspaces/w"})
		return err
	}, "DeleteWorkspace workspaces/w OK CHANGED gen 9 x1"},
	{"CreateToken", func(h *harness) error {
		h.token(&workspacev1.Token{Subject: "ci", Roles: []workspacev1.Role{viewer}}, 0)
		return nil
	}, "CreateToken tokens/ID OK CHANGED gen 0 x1"},
	{"RevokeToken", func(h *harness) error {
		_, err := h.Admin.RevokeToken(h.ctx(), &workspacev1.RevokeTokenRequest{Name: h.tokens()[0].GetName()})
		return err
	}, "RevokeToken tokens/ID OK CHANGED gen 0 x1"},
	{"RotateKey", func(h *harness) error {
		_, err := h.Admin.RotateKey(h.ctx(), &workspacev1.RotateKeyRequest{})
		return err
	}, "RotateKey  OK CHANGED gen 0 x1"},
}

// tokenName is a token's, which nobody can know before.
var tokenName = regexp.MustCompile(`^tokens/[a-z0-9]{16}$`)

// ourMethods are those of our services, and whether they have side effects.
func ourMethods() map[string]bool {
	methods := map[string]bool{}
	for _, file := range []protoreflect.FileDescriptor{workspacev1.File_workspace_v1_workspace_control_proto, workspacev1.File_workspace_v1_admin_control_proto} {
		for i := range file.Services().Len() {
			all := file.Services().Get(i).Methods()
			for j := range all.Len() {
				options, _ := all.Get(j).Options().(*descriptorpb.MethodOptions)
				methods[string(all.Get(j).Name())] = options.GetIdempotencyLevel() != descriptorpb.MethodOptions_NO_SIDE_EFFECTS
			}
		}
	}
	return methods
}

// Every RPC that has side effects leaves exactly one entry, and none that has none.
func TestAudit_EveryRPC(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		left := ourMethods()
		for _, c := range auditedCalls {
			if !left[c.rpc] {
				t.Errorf("%s has no side effects", c.rpc)
			}
			delete(left, c.rpc)
			before := h.audit(&listAudit{})
			if err := c.call(h); err != nil {
				t.Fatalf("%s: %v", c.rpc, err)
			}
			after := h.since(before)
			if diff := cmp.Diff([]string{c.want}, brief(after)); diff != "" {
				t.Errorf("%s: %s", c.rpc, diff)
				continue
			}
			if e := after[0]; e.GetCallId() == "" || e.GetPeer() == "" || e.GetSubject() == "" || e.GetTime() == nil || e.GetSequence() != int64(len(before)+1) || len(e.GetHash()) != 32 {
				t.Errorf("%s: got %v", c.rpc, e)
			}
			if c.rpc == "CreateWorkspace" {
				if diff := cmp.Diff([]string{"A", "B"}, after[0].GetKeys()); diff != "" {
					t.Error(diff)
				}
			}
		}
		for rpc, sideEffects := range left {
			if sideEffects {
				t.Errorf("%s has side effects, and no call in auditedCalls", rpc)
			}
		}
	})
}

// A workspace that gets its id from the server is in the log under it; a call that
// changes nothing is there as well, and says so.
func TestAudit_Effects(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		w := must2(h.Client.CreateWorkspace(h.ctx(), &createReq{Workspace: &ws{Spec: spec()}, RequestId: "id"}))(t).GetWorkspace()
		must2(h.Client.CreateWorkspace(h.ctx(), &createReq{Workspace: &ws{Spec: spec()}, RequestId: "id"}))(t)
		must2(h.Client.SetModel(h.ctx(), &workspacev1.SetModelRequest{Name: w.GetName()}))(t)
		must2(h.Client.SetModel(h.ctx(), &workspacev1.SetModelRequest{Name: w.GetName(), Model: "m", ValidateOnly: true}))(t)
		must2(h.Client.DeleteWorkspace(h.ctx(), &workspacev1.DeleteWorkspaceRequest{Name: "workspaces/none", AllowMissing: true}))(t)
		want := []string{
			"CreateWorkspace " + w.GetName() + " OK CHANGED gen 1 x1",
			"SetModel " + w.GetName() + " OK UNCHANGED gen 1 x1",
			"SetModel " + w.GetName() + " OK VALIDATED gen 2 x1",
			"DeleteWorkspace workspaces/none OK UNCHANGED gen 0 x1",
		}
		got := h.audit(&listAudit{})
		repeated := slices.IndexFunc(got, func(e *auditEntry) bool { return e.GetEffect() == workspacev1.AuditEffect_AUDIT_EFFECT_REPEATED })
		if repeated < 0 || got[repeated].GetRequestId() != "id" || got[0].GetRequestId() != "id" {
			t.Fatalf("got %v", got)
		}
		if diff := cmp.Diff(want, brief(slices.Delete(got, repeated, repeated+1))); diff != "" {
			t.Error(diff)
		}
	})
}

// Every bad input of a change is counted, with its code and reason; that of a read
// if it is refused; that there is nothing to be read is no refusal.
func TestAudit_BadInput(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("old", func(r *createReq) { r.Secrets = []*secret{text("TOKEN", "x")} })
		h.create("parked")
		must2(h.Client.StopWorkspace(h.ctx(), &workspacev1.StopWorkspaceRequest{Name: "workspaces/parked"}))(h.t)
		sideEffects, want := ourMethods(), map[string]int64{}
		clients := h.badInputClients()
		before := len(h.audit(&listAudit{}))
		for _, tt := range badInputs() {
			rpc, _, _ := strings.Cut(tt.name, "/")
			err := tt.call(clients[tt.workspace], h.ctx())
			synctest.Wait()
			if code := codeOf(err); sideEffects[rpc] || code == codes.InvalidArgument {
				want[fmt.Sprintf("%s %s %s", rpc, strings.ToUpper(code.String()), reasonOf(err))]++
			}
		}
		got := map[string]int64{}
		for _, e := range h.audit(&listAudit{})[before:] {
			code := strings.ReplaceAll(e.GetCode(), "_", "")
			if e.Reason == "REQUEST_TOO_LARGE" {
				e.Reason = "" // which gRPC does not tell the caller
			}
			got[fmt.Sprintf("%s %s %s", e.GetMethod()[strings.LastIndex(e.GetMethod(), "/")+1:], code, e.GetReason())] += e.GetCount()
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	})
}

// rawCodec sends bytes as they are.
type rawCodec struct{ encoding.CodecV2 }

func (rawCodec) Name() string { return "proto" }
func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}
func (rawCodec) Unmarshal(mem.BufferSlice, any) error { return nil }

// What is no request at all is refused, and counted like all else, with a reason.
func TestAudit_NoRequest(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		for _, c := range []struct {
			name, method string
			body         []byte
			code         codes.Code // for the caller
			reason       string
		}{
			{"malformed change", "/workspace.v1.WorkspaceControl/SetSecret", []byte("\xff\xff\xff"), codes.Internal, "MALFORMED_REQUEST"},
			{"malformed read", "/workspace.v1.WorkspaceControl/GetWorkspace", []byte("\xff\xff\xff"), codes.Internal, "MALFORMED_REQUEST"},
			{"malformed check", "/grpc.health.v1.Health/Check", []byte("\xff\xff\xff"), codes.Internal, "MALFORMED_REQUEST"},
			{"too large", "/workspace.v1.WorkspaceControl/GetWorkspace", make([]byte, 5<<20), codes.ResourceExhausted, "REQUEST_TOO_LARGE"},
			{"unknown method", "/workspace.v1.WorkspaceControl/FormatDisk", nil, codes.Unimplemented, "UNKNOWN_METHOD"},
			{"unknown service", "/some.Service/Do", nil, codes.Unimplemented, "UNKNOWN_METHOD"},
		} {
			before := h.audit(&listAudit{})
			for range 3 {
				wantCode(t, h.Conn.Invoke(h.ctx(), c.method, c.body, &struct{}{}, grpc.ForceCodecV2(rawCodec{})), c.code, "")
			}
			synctest.Wait() // gRPC itself has answered, before the entry was made
			after := h.since(before)
			method, code := strings.TrimPrefix(c.method, "/"), map[codes.Code]string{codes.Internal: "INVALID_ARGUMENT", codes.ResourceExhausted: "RESOURCE_EXHAUSTED", codes.Unimplemented: "UNIMPLEMENTED"}[c.code]
			if c.code == codes.Unimplemented {
				method = "unknown"
			}
			if len(after) != 1 || after[0].GetCount() != 3 || after[0].GetMethod() != method || after[0].GetCode() != code || after[0].GetReason() != c.reason || after[0].GetLastTime() == nil {
				t.Errorf("%s: got %v", c.name, after)
			}
		}
		if strings.Contains(h.log.String(), "level=ERROR") {
			t.Error("the log has errors")
		}
	})
}

// Thousands of refused calls at once are counted one by one, in few entries.
func TestAudit_CountsAFlood(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		const callers, each = 8, 150
		var wg sync.WaitGroup
		for i := range callers {
			wg.Go(func() {
				for n := range each {
					switch n % 3 {
					case 0:
						_, _ = h.Client.GetWorkspace(h.ctx(), &workspacev1.GetWorkspaceRequest{Name: fmt.Sprint("bad name", i, n)})
					case 1:
						_, _ = h.Client.RestartWorkspace(h.ctx(), &workspacev1.RestartWorkspaceRequest{Name: fmt.Sprintf("workspaces/none-%d-%d", i, n)})
					case 2:
						_ = h.Conn.Invoke(h.ctx(), fmt.Sprint("/a.B/", n), &workspacev1.GetServerInfoRequest{}, &workspacev1.GetServerInfoResponse{})
					}
				}
			})
		}
		wg.Wait()
		got := map[string]int64{}
		entries := h.audit(&listAudit{})
		for _, e := range entries {
			got[e.GetMethod()+" "+e.GetCode()] += e.GetCount()
		}
		want := map[string]int64{
			"workspace.v1.WorkspaceControl/GetWorkspace INVALID_ARGUMENT": callers * each / 3,
			"workspace.v1.WorkspaceControl/RestartWorkspace NOT_FOUND":    callers * each / 3,
			"unknown UNIMPLEMENTED": callers * each / 3,
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
		if len(entries) > 300 {
			t.Errorf("%d entries", len(entries))
		}
	})
}

// Wherever a caller puts a value, right or wrong, it is not in the log.
func TestContract17_AuditHasNoValue(t *testing.T) {
	const canary = "c4n4ry-V4lue"
	run(t, func(t *testing.T, h *harness) {
		h.create("w", func(r *createReq) { r.Secrets = []*secret{text("A", canary)} })
		ctx, c := h.ctx(), h.Client
		set := func(r *workspacev1.SetSecretRequest) { _, _ = c.SetSecret(ctx, r) }
		good := &workspacev1.SetSecretRequest_Text{Text: canary}
		set(&workspacev1.SetSecretRequest{Name: "workspaces/w/secrets/A", Payload: &workspacev1.SetSecretRequest_Text{Text: canary + "2"}})
		set(&workspacev1.SetSecretRequest{Name: "workspaces/w/secrets/A", Payload: good, Etag: canary})
		set(&workspacev1.SetSecretRequest{Name: "workspaces/w/secrets/" + canary, Payload: good})
		set(&workspacev1.SetSecretRequest{Name: canary, Payload: good})
		set(&workspacev1.SetSecretRequest{Name: "secrets/A=" + canary, Payload: good})
		set(&workspacev1.SetSecretRequest{Name: "secrets/A", Payload: good, RequestId: "x " + canary})
		_ = batch(&workspacev1.BatchUpdateSecretsRequest{Parent: canary, Secrets: []*secret{text(canary, canary)}, DeleteKeys: []string{canary}})(c, ctx)
		_ = create(&createReq{WorkspaceId: canary, Workspace: &ws{Spec: spec(), Model: canary}, Secrets: []*secret{text("A", canary)}})(c, ctx)
		_ = update(&ws{Name: "workspaces/w", Labels: map[string]string{canary: canary}, Model: canary}, "labels", "model", canary)(c, ctx)
		_, _ = c.SetModel(ctx, &workspacev1.SetModelRequest{Name: "workspaces/w", Model: canary})
		_ = list(&workspacev1.ListWorkspacesRequest{Filter: canary, PageToken: canary, OrderBy: canary})(c, ctx)
		_ = h.Conn.Invoke(ctx, "/a.B/"+canary, &workspacev1.GetServerInfoRequest{}, &workspacev1.GetServerInfoResponse{})
		_, _ = h.Admin.ListAuditEntries(ctx, &listAudit{PageToken: canary, Subject: canary})
		entries := h.audit(&listAudit{})
		b := must2(json.Marshal(entries))(t)
		if len(entries) < 12 || strings.Contains(string(b), canary) {
			t.Errorf("%d entries: %s", len(entries), b)
		}
	})
}

func TestListAuditEntries(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("a")
		advance(time.Minute)
		noon := time.Now()
		h.set("workspaces/a/secrets/K", "1")
		h.set("secrets/K", "1")
		advance(time.Minute)
		_, _ = h.Client.RestartWorkspace(h.ctx(), &workspacev1.RestartWorkspaceRequest{Name: "workspaces/b"})
		h.audit(&listAudit{})
		h.set("workspaces/a/secrets/K", "2")
		all := brief(h.audit(&listAudit{}))
		if len(all) != 5 {
			t.Fatalf("got %q", all)
		}
		reversed := slices.Clone(all)
		slices.Reverse(reversed)
		for name, tt := range map[string]struct {
			req  *listAudit
			want []string
		}{
			"all, in pages":    {&listAudit{PageSize: 2}, all},
			"newest, in pages": {&listAudit{PageSize: 2, NewestFirst: true}, reversed},
			"method":           {&listAudit{Method: "SetSecret"}, []string{all[1], all[2], all[4]}},
			"full method":      {&listAudit{Method: "workspace.v1.WorkspaceControl/RestartWorkspace"}, []string{all[3]}},
			"resource":         {&listAudit{Resource: "workspaces/a", PageSize: 1}, []string{all[0], all[1], all[4]}},
			"code":             {&listAudit{Code: "NOT_FOUND"}, []string{all[3]}},
			"start":            {&listAudit{StartTime: timestamppb.New(noon), NewestFirst: true}, []string{all[4], all[3], all[2], all[1]}},
			"end":              {&listAudit{EndTime: timestamppb.New(noon)}, []string{all[0]}},
			"both and method":  {&listAudit{StartTime: timestamppb.New(noon), EndTime: timestamppb.New(noon.Add(time.Second)), Method: "SetSecret"}, []string{all[1], all[2]}},
			"subject":          {&listAudit{Subject: "nobody"}, nil},
		} {
			if diff := cmp.Diff(tt.want, brief(h.audit(tt.req))); diff != "" {
				t.Errorf("%s: %s", name, diff)
			}
		}
		token := must2(h.Admin.ListAuditEntries(h.ctx(), &listAudit{PageSize: 1}))(t).GetNextPageToken()
		for field, req := range map[string]*listAudit{
			"page_token": {PageToken: token, NewestFirst: true},
			"page_size":  {PageSize: -1},
			"start_time": {StartTime: &timestamppb.Timestamp{Nanos: -1}},
			"end_time":   {EndTime: &timestamppb.Timestamp{Seconds: 1 << 60}},
			"subject":    {Subject: strings.Repeat("x", 513)},
		} {
			_, err := h.Admin.ListAuditEntries(h.ctx(), req)
			wantCode(t, err, codes.InvalidArgument, "INVALID_FIELDS")
			if fields(err)[field] == "" {
				t.Errorf("%s: got %v", field, err)
			}
		}
	})
}

// What is in the log is there after a restart, and what was refused a moment before
// an orderly end.
func TestAudit_SurvivesRestart(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("a")
		before := must2(h.Admin.VerifyAuditLog(h.ctx(), &workspacev1.VerifyAuditLogRequest{}))(t)
		must(t, 0, h.Restart())
		after := must2(h.Admin.VerifyAuditLog(h.ctx(), &workspacev1.VerifyAuditLogRequest{}))(t)
		if before.GetLastSequence() != 1 || string(after.GetHeadHash()) != string(before.GetHeadHash()) {
			t.Errorf("before %v, after %v", before, after)
		}
		ctx, cancel := context.WithTimeout(h.ctx(), time.Second)
		defer cancel()
		_, err := h.Client.RestartWorkspace(ctx, &workspacev1.RestartWorkspaceRequest{Name: "workspaces/none"})
		wantCode(t, err, codes.NotFound, "")
		if got := brief(h.audit(&listAudit{Code: "NOT_FOUND"})); len(got) != 1 {
			t.Errorf("got %q", got)
		}
	})
}
