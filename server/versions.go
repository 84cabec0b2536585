package server

import (
	"context"
	"fmt"
	"strconv"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/store"
)

// ListSecretVersions implements workspace.v1.WorkspaceControl.
//
// INVALID_ARGUMENT, NOT_FOUND.
func (s *Server) ListSecretVersions(_ context.Context, req *workspacev1.ListSecretVersionsRequest) (*workspacev1.ListSecretVersionsResponse, error) {
	scope, key, err := parseSecretName("parent", req.GetParent())
	if err != nil {
		return nil, err
	}
	list := []string{"versions", s.store.InstanceUID(), req.GetParent()}
	var below int64 // 0: from the newest one on
	last, err := decodeCursor(req.GetPageToken(), list...)
	if err == nil && last.ID != "" {
		below, err = strconv.ParseInt(last.ID, 10, 64)
	}
	if err != nil {
		return nil, err
	}
	page, more, err := s.store.ListSecretVersions(scope, key, below, pageSize(req.GetPageSize()))
	if err != nil {
		return nil, err
	}
	resp := &workspacev1.ListSecretVersionsResponse{}
	for i := range page {
		resp.SecretVersions = append(resp.SecretVersions, versionToProto(&page[i]))
	}
	if more {
		resp.NextPageToken = encodeToken(cursor{ID: strconv.FormatInt(page[len(page)-1].Version, 10)}, list...)
	}
	return resp, nil
}

// RollBackSecret implements workspace.v1.WorkspaceControl.
//
// INVALID_ARGUMENT, NOT_FOUND, ABORTED, FAILED_PRECONDITION, RESOURCE_EXHAUSTED,
// UNAVAILABLE, DATA_LOSS.
func (s *Server) RollBackSecret(ctx context.Context, req *workspacev1.RollBackSecretRequest) (*workspacev1.RollBackSecretResponse, error) {
	scope, key, err := parseSecretName("name", req.GetName())
	if err != nil {
		return nil, err
	}
	o, err := s.options(ctx, workspacev1.WorkspaceControl_RollBackSecret_FullMethodName, req, req.GetEtag())
	if err != nil {
		return nil, err
	}
	r, err := s.store.UpdateSecrets(ctx, scope, store.SecretsUpdate{
		RollBack:  &store.RollBack{Key: key, Version: req.GetVersion()},
		NextStart: nextStart(req.GetApply()),
		Live:      live(req.GetApply()),
	}, o)
	if err != nil {
		return nil, err
	}
	if len(r.Secrets) != 1 {
		return nil, fmt.Errorf("store answered %d secrets after one was rolled back", len(r.Secrets))
	}
	return &workspacev1.RollBackSecretResponse{
		Secret:             secretToProto(&r.Secrets[0]),
		Generation:         r.Workspace.Generation,
		Changed:            r.Changed,
		AffectedWorkspaces: int32(r.Affected),
	}, nil
}

// EnableSecretVersion implements workspace.v1.WorkspaceControl.
//
// INVALID_ARGUMENT, NOT_FOUND, FAILED_PRECONDITION, RESOURCE_EXHAUSTED,
// UNAVAILABLE, DATA_LOSS.
func (s *Server) EnableSecretVersion(ctx context.Context, req *workspacev1.EnableSecretVersionRequest) (*workspacev1.EnableSecretVersionResponse, error) {
	r, err := s.setVersionState(ctx, workspacev1.WorkspaceControl_EnableSecretVersion_FullMethodName, req, store.VersionEnabled)
	if err != nil {
		return nil, err
	}
	return &workspacev1.EnableSecretVersionResponse{SecretVersion: versionToProto(&r.Version), Generation: r.Workspace.Generation, Changed: r.Changed}, nil
}

// DisableSecretVersion implements workspace.v1.WorkspaceControl. Errors as of
// EnableSecretVersion.
func (s *Server) DisableSecretVersion(ctx context.Context, req *workspacev1.DisableSecretVersionRequest) (*workspacev1.DisableSecretVersionResponse, error) {
	r, err := s.setVersionState(ctx, workspacev1.WorkspaceControl_DisableSecretVersion_FullMethodName, req, store.VersionDisabled)
	if err != nil {
		return nil, err
	}
	return &workspacev1.DisableSecretVersionResponse{SecretVersion: versionToProto(&r.Version), Generation: r.Workspace.Generation, Changed: r.Changed}, nil
}

// DestroySecretVersion implements workspace.v1.WorkspaceControl. Errors as of
// EnableSecretVersion.
func (s *Server) DestroySecretVersion(ctx context.Context, req *workspacev1.DestroySecretVersionRequest) (*workspacev1.DestroySecretVersionResponse, error) {
	r, err := s.setVersionState(ctx, workspacev1.WorkspaceControl_DestroySecretVersion_FullMethodName, req, store.VersionDestroyed)
	if err != nil {
		return nil, err
	}
	return &workspacev1.DestroySecretVersionResponse{SecretVersion: versionToProto(&r.Version), Generation: r.Workspace.Generation, Changed: r.Changed}, nil
}

// versionChange is a change of one version.
type versionChange interface {
	change
	GetName() string
}

func (s *Server) setVersionState(ctx context.Context, method string, req versionChange, state store.VersionState) (store.Result, error) {
	scope, key, version, err := parseVersionName("name", req.GetName())
	if err != nil {
		return store.Result{}, err
	}
	o, err := s.options(ctx, method, req, "")
	if err != nil {
		return store.Result{}, err
	}
	return s.store.SetVersionState(ctx, scope, key, version, state, o)
}
