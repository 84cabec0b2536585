package kek

import (
	"context"
	"errors"
	"net/http"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/smithy-go"
	"github.com/tink-crypto/tink-go-awskms/v3/integration/awskms"
	"github.com/tink-crypto/tink-go/v2/tink"

	"github.com/workspaced/workspaced/store/seal"
)

// secretsAWS are the SDK's variables that have secrets.
var secretsAWS = []string{"AWS_SECRET_ACCESS_KEY", "AWS_SECRET_KEY", "AWS_SESSION_TOKEN", "AWS_CONTAINER_AUTHORIZATION_TOKEN"}

type awsKMS struct {
	aead        tink.AEADWithContext
	credentials aws.CredentialsProvider
}

func openAWS(ctx context.Context, s source, _ bool) (seal.KEK, error) {
	region := strings.Split(s.rest, ":")[3]
	cfg, err := config.LoadDefaultConfig(ctx, config.WithRegion(region))
	if err != nil { // it may quote a line of a credentials file
		return nil, errors.New("the configuration for AWS (its variables, ~/.aws/config, ~/.aws/credentials) is not valid")
	}
	client := kms.NewFromConfig(cfg, func(o *kms.Options) {
		o.Retryer = aws.NopRetryer{} // who waits for the key tries again, and says so
		if c, ok := o.HTTPClient.(*awshttp.BuildableClient); ok {
			o.HTTPClient = &http.Client{Transport: c.GetTransport(), CheckRedirect: refuseRedirect}
		}
	})
	aead, err := awskms.NewAEADWithContext(ctx, s.rest, awskms.WithKMS(client))
	if err != nil {
		return nil, err
	}
	return newService(ctx, "AWS key "+s.uri, &awsKMS{aead, cfg.Credentials}), nil
}

func (k *awsKMS) encrypt(ctx context.Context, plain, associated []byte) ([]byte, error) {
	return k.do(ctx, k.aead.EncryptWithContext, plain, associated)
}

func (k *awsKMS) decrypt(ctx context.Context, wrapped, associated []byte) ([]byte, error) {
	return k.do(ctx, k.aead.DecryptWithContext, wrapped, associated)
}

func (k *awsKMS) do(ctx context.Context, ask func(context.Context, []byte, []byte) ([]byte, error), in, associated []byte) ([]byte, error) {
	// By itself, for its errors say little and can't be told from others.
	if _, err := k.credentials.Retrieve(ctx); err != nil {
		return nil, fail(ErrUnavailable, "there are no credentials for AWS, or they can't be had now")
	}
	out, err := ask(ctx, in, associated)
	if err != nil {
		return nil, awsError(err)
	}
	return out, nil
}

func awsError(err error) error {
	status := 0
	if answer := new(awshttp.ResponseError); errors.As(err, &answer) {
		status = answer.HTTPStatusCode()
	}
	if status == 0 {
		return noAnswer(err)
	}
	code := ""
	if api := smithy.APIError(nil); errors.As(err, &api) {
		code = api.ErrorCode()
	}
	switch code {
	case "InvalidCiphertextException", "IncorrectKeyException":
		return seal.ErrOpen
	case "NotFoundException":
		return fail(ErrNoKey, "there is no such key (%s)", code)
	case "AccessDeniedException", "UnrecognizedClientException", "InvalidSignatureException", "InvalidClientTokenId", "MissingAuthenticationToken", "ExpiredTokenException", "IncompleteSignature":
		return fail(ErrDenied, "permission denied (%s): kms:Encrypt and kms:Decrypt are needed", code)
	case "DisabledException", "InvalidKeyUsageException", "KMSInvalidStateException", "InvalidGrantTokenException":
		return fail(ErrRefused, "the key is disabled, about to be deleted, or of another kind (%s)", code)
	}
	switch {
	case isRedirect(status):
		return redirected(status)
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		return fail(ErrDenied, "permission denied (HTTP %d): kms:Encrypt and kms:Decrypt are needed", status)
	case status == http.StatusNotFound:
		return fail(ErrNoKey, "there is no such key, or no KMS at this address (HTTP 404)")
	case status >= 500, status == http.StatusTooManyRequests, code == "ThrottlingException", code == "LimitExceededException":
		return fail(ErrUnavailable, "it fails (HTTP %d)", status)
	case status >= 400:
		return fail(ErrRefused, "it refuses (HTTP %d)", status)
	}
	return errGarbage
}
